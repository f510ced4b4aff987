// One run of a request: read as it arrives, cut, resumed, and reconnected when the server is unavailable.

import { DownloadProof, EventProof } from "./proof.js";
import { EventStreamParser } from "./sse.js";

/** Default time before reconnecting, in milliseconds. */
const RETRY = 1000;
/** Maximum time before reconnecting, in milliseconds. */
const MAX_RETRY = 15000;
/** Maximum processing time before the page can draw, in milliseconds. */
const SLICE = 12;
/** Minimum bytes processed at once at a limited pace: browsers read ahead, and chunks get large. */
const MIN_PART = 4096;
/** Maximum bytes of an error response that are parsed for its `errors`. */
const PROBLEM = 65536;

/**
 * A request in progress. States: connecting, running, cut (by hand; resumable), disconnected (reconnects by itself),
 * and, finally, done, stopped or failed. `listener` has the callbacks state(), response(response), bytes(chunk) and
 * event(event, json).
 */
export class Run {
  state = "connecting";
  /** Details of the state. */
  detail = "";
  startedAt = performance.now();
  endedAt = null;
  /** The status of the first response; null before it. */
  status = null;
  /** Milliseconds from the request to the first byte of the body. */
  firstByte = null;
  bytes = 0;
  chunks = 0;
  events = 0;
  /** Milliseconds between chunks: the latest few thousand. */
  gaps = [];
  proof = null;
  /** The `errors` of an error response (RFC 9457). */
  errors = [];

  #listener;
  #request;
  #ranges;
  #pace;
  #abort = new AbortController();
  #endState = "";
  #timer = 0;
  #attempts = 0;
  #parser = null;
  #decoder = null;
  #validator = null;
  #location = null;
  #lastEvent = null;
  #lastChunkAt = 0;
  #errorText = "";

  /** `ranges`: whether the route declares ranges. `pace()`: bytes per second to read, 0 for no limit. */
  constructor(request, { ranges, pace, listener }) {
    this.#request = request;
    this.#ranges = ranges;
    this.#pace = pace;
    this.#listener = listener;
  }

  get over() {
    return ["done", "stopped", "failed"].includes(this.state);
  }

  /** Whether the response is an event stream. */
  get hasEvents() {
    return this.#parser !== null;
  }

  /** Whether the run can be resumed after a cut. */
  get resumable() {
    if (this.#parser)
      return Boolean(this.#parser.lastId) && (this.#request.method === "GET" || this.#location !== null);
    return this.#validator !== null && this.#request.method === "GET";
  }

  /** The header fields with which the next request resumes; "" if it cannot. */
  get continuation() {
    if (!this.resumable) return "";
    if (this.#parser) return `Last-Event-ID: ${this.#parser.lastId}`;
    return `Range: bytes=${this.proof.received}-, If-Range: ${this.#validator}`;
  }

  start() {
    this.#connect(this.#request);
  }

  /** Abort the connection, as a network failure does. */
  cut() {
    this.#end("cut");
  }

  /** Abort the connection and do not reconnect. */
  stop() {
    this.#end("stopped");
  }

  /** Resume after the data that has arrived. */
  resume() {
    clearTimeout(this.#timer);
    const { "Content-Type": _, ...headers } = this.#request.headers; // of the body, which is not sent again
    const next = { method: "GET", url: this.#request.url, headers, body: null };
    if (this.#parser) {
      this.#parser.reconnect();
      headers["Last-Event-ID"] = this.#parser.lastId;
      headers["Accept"] = "text/event-stream"; // the Location may have other media types
      // A stream with a Location is resumed there: the first request might start another one.
      if (this.#location) next.url = this.#location;
    } else Object.assign(headers, { Range: `bytes=${this.proof.received}-`, "If-Range": this.#validator });
    this.#connect(next);
  }

  #end(state) {
    clearTimeout(this.#timer);
    this.#endState = state;
    if (this.state === "disconnected" || this.state === "cut") this.#setState(state);
    else this.#abort.abort();
  }

  #setState(state, detail = "") {
    this.state = state;
    this.detail = detail;
    if (state === "cut" || state === "disconnected") this.proof?.disconnect?.();
    if (this.over) this.endedAt = performance.now();
    if (this.over) this.#abort.abort(); // the rest of the response is not needed
    this.#listener.state();
  }

  async #connect(request) {
    const resuming = this.proof !== null && (this.state === "cut" || this.state === "disconnected");
    this.#endState = "";
    this.#abort = new AbortController();
    this.#setState("connecting");
    const { url, method, headers } = request;
    const body = request.body ?? undefined;
    let response;
    try {
      response = await fetch(url, { method, headers, body, signal: this.#abort.signal, cache: "no-store" });
    } catch {
      if (this.#endState) return this.#setState(this.#endState);
      return resuming
        ? this.#reconnect("The server cannot be reached.")
        : this.#setState("failed", "The server cannot be reached.");
    }
    if (resuming && response.status === 503)
      return this.#reconnect("The server is not ready.", 1000 * (Number(response.headers.get("Retry-After")) || 0));
    if (!this.#accept(response, resuming)) return;
    this.status ??= response.status;
    // The rest of a download follows what has arrived, unless the server sends another file from its beginning.
    this.#listener.response(response, resuming && (this.#parser !== null || response.status === 206));
    this.#setState("running");
    try {
      await this.#read(response);
    } catch {
      if (this.#endState) return this.#setState(this.#endState);
      const failed = this.#lastEvent?.event === "error";
      if (this.resumable && !failed) return this.#reconnect("The connection was lost.");
      return this.#setState(
        "failed",
        failed
          ? "The source failed, and the server aborted the response: the data is incomplete."
          : "The connection was lost: the data is incomplete.",
      );
    }
    const last = this.#lastEvent;
    if (last?.event === "stop") return this.#reconnect("The server is stopping.");
    if (last?.event === "control" && !parsed(last.data)?.streamClosed) return this.#reconnect("The stream goes on.");
    if (this.proof instanceof DownloadProof) await this.proof.finish(this.#request.url);
    if (response.ok) return this.#setState("done");
    this.errors = parsed(this.#errorText)?.errors ?? [];
    this.#setState("failed", "The server rejected the request.");
  }

  /** Process the head of a response; return false if it ends the run. */
  #accept(response, resuming) {
    const type = (response.headers.get("Content-Type") ?? "").split(";")[0];
    if (response.status === 204 && resuming) {
      this.#setState("done", "The server has no more events (204).");
      return false;
    }
    if (resuming && !response.ok) {
      this.#listener.response(response, false);
      this.#setState("failed", `The server does not resume: ${response.status}.`);
      return false;
    }
    if (resuming && this.#parser && type !== "text/event-stream") {
      this.#setState("failed", "The server does not resume the event stream.");
      return false;
    }
    const total = length(response);
    if (resuming && this.proof instanceof DownloadProof) {
      if (response.status !== 206) this.proof.restart(total);
      else if (!this.proof.resumeAt(...range(response))) {
        this.#setState("failed", "The server resumed at a different byte than requested.");
        return false;
      }
    } else if (!resuming && type === "text/event-stream" && response.ok) {
      this.#parser = new EventStreamParser();
      this.proof = new EventProof();
      const url = response.headers.get("Location");
      this.#location = url && new URL(url, location.href).origin === location.origin ? url : null;
    } else if (!resuming && this.#ranges && hasRanges(response)) {
      this.proof = new DownloadProof();
      this.proof.start(total);
    }
    // Only a strong validator guarantees that two parts belong to the same bytes (RFC 9110 13.1.5).
    const tag = response.headers.get("ETag");
    if (this.proof instanceof DownloadProof) this.#validator = tag?.startsWith('"') ? tag : null;
    this.#decoder = new TextDecoder();
    return true;
  }

  async #read(response) {
    const reader = response.body?.getReader();
    if (!reader) return;
    this.#lastChunkAt = 0;
    let sliceStart = performance.now();
    let due = sliceStart;
    for (;;) {
      const requestedAt = performance.now();
      const { done, value } = await reader.read();
      if (done) return;
      this.#attempts = 0;
      const now = performance.now();
      if (now - requestedAt > 1) sliceStart = now; // the page could draw while this waited
      this.#measure(now);
      for (let from = 0; from < value.length;) {
        const pace = this.#pace();
        const part = value.subarray(from, from + (pace ? Math.max(MIN_PART, Math.ceil(pace / 10)) : value.length));
        from += part.length;
        this.#process(part, response);
        if (pace) {
          // Back-pressure: data that is not read here fills the socket buffers, until the server waits.
          due = Math.max(due, performance.now() - 100) + (1000 * part.length) / pace;
          if (due > performance.now()) await this.#pause(due - performance.now());
        }
        if (performance.now() - sliceStart > SLICE) {
          await this.#pause(0);
          sliceStart = performance.now();
        }
        if (this.#endState) throw new DOMException("cut by hand", "AbortError");
      }
    }
  }

  #process(bytes, response) {
    this.bytes += bytes.length;
    this.#listener.bytes(bytes);
    if (this.#parser) {
      for (const event of this.#parser.feed(this.#decoder.decode(bytes, { stream: true }))) {
        this.events++;
        this.#lastEvent = event;
        const json = parsed(event.data);
        this.proof.add(event, json);
        this.#listener.event(event, json);
      }
    } else if (this.proof) this.proof.add(bytes);
    else if (!response.ok && this.bytes < PROBLEM) this.#errorText += this.#decoder.decode(bytes, { stream: true });
  }

  #measure(now) {
    if (this.firstByte === null) this.firstByte = now - this.startedAt;
    if (this.#lastChunkAt) {
      this.gaps.push(now - this.#lastChunkAt);
      if (this.gaps.length > 4000) this.gaps.splice(0, 2000);
    }
    this.#lastChunkAt = now;
    this.chunks++;
  }

  /** Wait, or return early when the run is aborted. */
  #pause(milliseconds) {
    return new Promise((resolve) => {
      const signal = this.#abort.signal;
      const timer = setTimeout(finished, milliseconds);
      signal.addEventListener("abort", finished, { once: true });
      function finished() {
        clearTimeout(timer);
        signal.removeEventListener("abort", finished);
        resolve();
      }
    });
  }

  #reconnect(reason, atLeast = 0) {
    const base = this.#parser?.retry ?? RETRY;
    const wait = Math.max(Math.min(base * 2 ** this.#attempts, Math.max(MAX_RETRY, base)), atLeast);
    this.#attempts++;
    this.#lastEvent = null;
    this.#timer = setTimeout(() => this.resume(), wait);
    this.#setState("disconnected", `${reason} Reconnecting in ${(wait / 1000).toFixed(1)} s (try ${this.#attempts}).`);
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    return undefined;
  }
}

function hasRanges(response) {
  return response.status === 200 && response.headers.get("Accept-Ranges") === "bytes";
}

function length(response) {
  const header = response.headers.get("Content-Length");
  return header === null || response.headers.get("Content-Encoding") ? null : Number(header);
}

/** Return the first byte of a 206, and the size of the complete file. */
function range(response) {
  const found = /^bytes (\d+)-\d+\/(\d+)$/.exec(response.headers.get("Content-Range") ?? "");
  return found ? [Number(found[1]), Number(found[2])] : [NaN, null];
}
