// Checks that no data was lost across a cut: consecutive ids of events; size and SHA-256 of a download.

import { position, rowsOf } from "./sse.js";

const number = new Intl.NumberFormat("en");

/** Minimum number of consecutive offsets that shows that a view filters nothing: a jump across a cut is a loss then. */
const MIN_CONSECUTIVE = 10;

/** Maximum size of a download that is hashed, in bytes: hashing more would slow down a fast server. */
const MAX_HASHED = 256e6;

const events = (count) => `${number.format(count)} ${count === 1 ? "event" : "events"}`;

/** Checks whether the events of a run are consecutive. */
export class EventProof {
  #last = null;
  #first = null;
  #count = 0;
  #isCut = false;
  #seam = null;
  #jumps = 0;
  #repeated = 0;
  #gap = null;
  #lost = 0;
  #epochs = 0;
  #joined = false;

  add(event, json) {
    if (event.event === "gap")
      this.#gap = typeof json?.missing === "number" ? events(json.missing) : "an unknown number of events";
    const here = event.hasOwnId && position(event.id);
    if (!here || event.event === "control") return; // which repeats the position of the data before it
    const last = this.#last;
    const follows = last !== null && here.epoch === last.epoch;
    const distance = follows ? here.offset - last.offset : here.offset;
    // A batch has the position of its last part as its id. One of a stream may have fewer offsets than parts: an
    // append of several values has one; and the parts of a stream that is not JSON are not known.
    const isBatch = event.event === "data";
    const parts = isBatch && !Array.isArray(json) ? Infinity : (rowsOf(event, json)?.length ?? 1);
    const joined = isBatch && distance < parts && (distance > 0 || !follows);
    const step = joined ? Math.max(1, distance) : parts;
    const missing = follows ? distance - step : 0;
    this.#joined ||= joined;
    if (last !== null && !follows) this.#epochs++;
    if (missing < 0) {
      this.#repeated++;
      return;
    }
    if (this.#isCut) {
      this.#seam = { before: last.offset, after: here.offset - step + 1 };
      this.#lost += missing;
    } else if (missing > 0) this.#jumps++;
    this.#first ??= here.offset - step + 1;
    this.#isCut = false;
    this.#last = here;
    this.#count += isBatch ? step : 1;
  }

  /** The connection was lost: the next event must be consecutive. */
  disconnect() {
    this.#isCut = this.#last !== null;
  }

  /** {mark, text}; `mark` is "good", "bad", "warn", or "" while there is no result. */
  verdict() {
    const seam = this.#seam;
    if (this.#repeated) return { mark: "bad", text: `${events(this.#repeated)} arrived twice.` };
    if (this.#epochs) return { mark: "warn", text: "The history of this channel was lost: its ids have a new epoch." };
    if (this.#gap !== null)
      return { mark: "warn", text: `No longer retained by the server (event gap): ${this.#gap}.` };
    if (!seam) return { mark: "", text: "" };
    const across = `offset ${seam.before} was followed by ${seam.after}`;
    if (this.#joined)
      return {
        mark: "",
        text: `No duplicates: ${across}. Appends arrive joined here, so losses among them cannot be excluded.`,
      };
    if (this.#jumps)
      return {
        mark: "",
        text: `No duplicates, and no gap reported: ${across}. Losses cannot be excluded, since this view filters events: offsets jump without a cut, too.`,
      };
    if (this.#lost && this.#count < MIN_CONSECUTIVE)
      return {
        mark: "",
        text: `No duplicates, and no gap reported: ${across}. More events will show whether this view filters some.`,
      };
    if (this.#lost) return { mark: "bad", text: `${events(this.#lost)} missing: ${across}.` };
    const all = `all ${number.format(this.#count)} events from ${this.#first} to ${this.#last.offset}`;
    return { mark: "good", text: `Nothing was lost: ${across}, and ${all} arrived once, in order.` };
  }
}

/** Checks whether the parts of a download are the file of the server. */
export class DownloadProof {
  received = 0;
  parts = 1;

  #hash = null;
  #finished = false;
  #digest = null;
  #expected = null;
  #total = null;
  #changed = false;
  #seam = null;

  add(bytes) {
    this.received += bytes.length;
    this.#hash?.update(bytes);
  }

  /** Start with the total length from the first response. */
  start(total) {
    this.#total = total;
    this.#hash = total !== null && total > MAX_HASHED ? null : new Sha256();
  }

  /** A response resumes at `start`; return whether the last one was cut there. */
  resumeAt(start, total) {
    this.parts++;
    this.#seam = { requested: this.received, start };
    this.#total = total;
    return start === this.received;
  }

  /** The file has changed: the server sends the new one from its first byte. */
  restart(total) {
    this.received = 0;
    this.parts = 1;
    this.#changed = true;
    this.start(total);
  }

  /** The download is complete: compare it with the digest of the server, if it sends one. */
  async finish(url) {
    try {
      if (this.#hash === null) return;
      this.#digest = this.#hash.digest();
      const response = await fetch(url, {
        method: "HEAD",
        headers: { "Want-Repr-Digest": "sha-256=1" },
        cache: "no-store",
      });
      this.#expected = /sha-256=:([^:]+):/.exec(response.headers.get("Repr-Digest") ?? "")?.[1] ?? null;
    } catch {
      this.#expected = null; // the server is unavailable: only the size is checked
    } finally {
      this.#finished = true;
    }
  }

  verdict() {
    const ofTotal = this.#total === null ? "" : ` of ${number.format(this.#total)}`;
    const parts = this.parts === 1 ? "one part" : `${this.parts} parts`;
    if (!this.#finished) {
      if (this.#changed)
        return {
          mark: "warn",
          text: "The file has changed: the server sends the new one from its first byte.",
        };
      if (this.#seam === null) return { mark: "", text: "" };
      const { requested, start } = this.#seam;
      if (start !== requested)
        return {
          mark: "bad",
          text: `Requested byte ${number.format(requested)}, the server resumed at ${number.format(start)}.`,
        };
      return { mark: "good", text: `The server resumed at byte ${number.format(start)} exactly.` };
    }
    if (this.#total !== null && this.received !== this.#total)
      return { mark: "bad", text: `${number.format(this.received)}${ofTotal} bytes arrived.` };
    const received = `${number.format(this.received)} bytes in ${parts}`;
    if (this.#digest === null)
      return { mark: "good", text: `The size matches: ${received}. A download of this size is not hashed here.` };
    const digest = hex(this.#digest);
    const short = `${digest.slice(0, 8)}…${digest.slice(-8)}`;
    if (this.#expected === null)
      return {
        mark: "good",
        text: `The size matches: ${received}. Their SHA-256 is ${short}; the server sends none to compare.`,
      };
    if (base64(this.#digest) !== this.#expected)
      return { mark: "bad", text: `The SHA-256 of the ${parts}, ${short}, differs from the server's.` };
    return {
      mark: "good",
      text: `Nothing was lost: ${received}, and their SHA-256 ${short} matches the server's.`,
    };
  }
}

function hex(bytes) {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function base64(bytes) {
  return btoa(String.fromCharCode(...bytes));
}

// The constants of FIPS 180-4 are the fractions of square and cube roots of primes: they are computed, not copied.
const primes = [];
for (let candidate = 2; primes.length < 64; candidate++)
  if (primes.every((prime) => candidate % prime)) primes.push(candidate);
const fraction = (root) => ((root - Math.floor(root)) * 2 ** 32) | 0;
const START = Int32Array.from(primes.slice(0, 8), (prime) => fraction(Math.sqrt(prime)));
const ROUND = Int32Array.from(primes, (prime) => fraction(Math.cbrt(prime)));

/** SHA-256 of bytes that arrive in chunks, which the browser's own digest does not support. Source: FIPS 180-4. */
export class Sha256 {
  #state = START.slice();
  #block = new Uint8Array(64);
  #filled = 0;
  #length = 0;

  update(bytes) {
    this.#length += bytes.length;
    let from = 0;
    if (this.#filled) {
      from = Math.min(64 - this.#filled, bytes.length);
      this.#block.set(bytes.subarray(0, from), this.#filled);
      this.#filled += from;
      if (this.#filled < 64) return;
      compress(this.#state, this.#block, 0, 64);
    }
    const end = from + Math.floor((bytes.length - from) / 64) * 64;
    compress(this.#state, bytes, from, end);
    this.#block.set(bytes.subarray(end));
    this.#filled = bytes.length - end;
  }

  digest() {
    const bits = this.#length * 8;
    const padding = new Uint8Array((this.#length % 64 < 56 ? 64 : 128) - (this.#length % 64));
    padding[0] = 0x80;
    const view = new DataView(padding.buffer);
    view.setUint32(padding.length - 8, Math.floor(bits / 2 ** 32));
    view.setUint32(padding.length - 4, bits >>> 0);
    this.update(padding);
    const result = new DataView(new ArrayBuffer(32));
    this.#state.forEach((word, at) => result.setInt32(at * 4, word));
    return new Uint8Array(result.buffer);
  }
}

/** Process blocks of 64 bytes. Plain local variables double the speed in current engines. */
function compress(state, bytes, from, to) {
  const words = new Int32Array(64);
  const round = ROUND;
  let s0 = state[0],
    s1 = state[1],
    s2 = state[2],
    s3 = state[3];
  let s4 = state[4],
    s5 = state[5],
    s6 = state[6],
    s7 = state[7];
  while (from < to) {
    for (let at = 0; at < 16; at++, from += 4)
      words[at] = (bytes[from] << 24) | (bytes[from + 1] << 16) | (bytes[from + 2] << 8) | bytes[from + 3];
    for (let at = 16; at < 64; at++) {
      const one = words[at - 15];
      const two = words[at - 2];
      const small0 = ((one >>> 7) | (one << 25)) ^ ((one >>> 18) | (one << 14)) ^ (one >>> 3);
      const small1 = ((two >>> 17) | (two << 15)) ^ ((two >>> 19) | (two << 13)) ^ (two >>> 10);
      words[at] = (words[at - 16] + small0 + words[at - 7] + small1) | 0;
    }
    let a = s0,
      b = s1,
      c = s2,
      d = s3,
      e = s4,
      f = s5,
      g = s6,
      h = s7;
    for (let at = 0; at < 64; at++) {
      const big1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const first = (h + big1 + ((e & f) ^ (~e & g)) + round[at] + words[at]) | 0;
      const big0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const second = (big0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g;
      g = f;
      f = e;
      e = (d + first) | 0;
      d = c;
      c = b;
      b = a;
      a = (first + second) | 0;
    }
    s0 = (s0 + a) | 0;
    s1 = (s1 + b) | 0;
    s2 = (s2 + c) | 0;
    s3 = (s3 + d) | 0;
    s4 = (s4 + e) | 0;
    s5 = (s5 + f) | 0;
    s6 = (s6 + g) | 0;
    s7 = (s7 + h) | 0;
  }
  state.set([s0, s1, s2, s3, s4, s5, s6, s7]);
}
