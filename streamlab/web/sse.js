// Event streams: parsing bytes into events (WHATWG HTML 9.2), and the position in an id.

/** Parser of an event stream whose text arrives in chunks, split anywhere. */
export class EventStreamParser {
  lastId = "";
  /** Time before reconnecting, if the stream has sent it, in milliseconds. */
  retry = null;

  #rest = "";
  #fresh = true;
  #id = "";
  #hasOwnId = false;
  #event = "";
  #data = [];

  /** Yield the events that this text completes: {id, hasOwnId, event, data}; `hasOwnId` if it has an `id` field. */
  *feed(text) {
    if (this.#fresh && text) {
      text = text.replace(/^\uFEFF/, "");
      this.#fresh = false;
    }
    let buffer = this.#rest + text;
    let from = 0;
    // A CR at the end may be half of a CRLF: it waits for the next text.
    for (let match; (match = lineEnd(buffer, from)); from = match.next) {
      const event = this.#line(buffer.slice(from, match.at));
      if (event) yield event;
    }
    this.#rest = buffer.slice(from);
  }

  /** Start a new connection: drop an incomplete event, retain the last id. */
  reconnect() {
    this.#rest = "";
    this.#fresh = true;
    this.#event = "";
    this.#data = [];
    this.#id = this.lastId;
    this.#hasOwnId = false;
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    if (colon === 0) return null; // a comment: the heartbeat
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) [this.#id, this.#hasOwnId] = [value, true];
    else if (name === "retry" && /^\d+$/.test(value)) this.retry = Number(value);
    return null;
  }

  #dispatch() {
    this.lastId = this.#id;
    const data = this.#data.join("\n");
    const event = { id: this.#id, hasOwnId: this.#hasOwnId, event: this.#event || "message", data };
    const empty = this.#data.length === 0;
    this.#event = "";
    this.#data = [];
    this.#hasOwnId = false;
    return empty ? null : event;
  }
}

function lineEnd(text, from) {
  for (let at = from; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (code === 10) return { at, next: at + 1 };
    if (code === 13) return at + 1 === text.length ? null : { at, next: at + (text.charCodeAt(at + 1) === 10 ? 2 : 1) };
  }
  return null;
}

/**
 * Return the position of an event in its channel, from an id `<epoch>-<offset>`, `<prefix>:<epoch>-<offset>`, or
 * `<epoch>_<offset>` of a stream; null for other ids. Events outside the channel (`gap`, `stop`, `end` of a query) have a suffix in the id, and no position.
 */
export function position(id) {
  const found = /^(.*?)[-_](\d+)$/.exec(id);
  return found && { epoch: found[1], offset: Number(found[2]) };
}

/** Return the rows of an event that has several: `rows` of an export, or the messages of a stream; null for others. */
export function rowsOf({ event }, json) {
  if (event === "data" && Array.isArray(json)) return json;
  return Array.isArray(json?.rows) ? json.rows : null;
}
