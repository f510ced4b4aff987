// Event streams: parsing bytes into events (WHATWG HTML 9.2), and the position in an id.

/** Events of a stream whose text is fed in chunks, split anywhere. */
export class EventStreamParser {
  lastId = "";
  /** Time before reconnecting, if the stream has sent it, in milliseconds. */
  retry = null;

  #rest = "";
  #fresh = true;
  #id = "";
  #named = false;
  #event = "";
  #data = [];

  /** Yield the events that are complete with this text: {id, named, event, data}; `named` if the id is its own. */
  *feed(text) {
    if (this.#fresh && text) {
      text = text.replace(/^\uFEFF/, "");
      this.#fresh = false;
    }
    let buffer = this.#rest + text;
    let from = 0;
    // A CR at the end may be half of a CRLF: it waits for what follows.
    for (let match; (match = lineEnd(buffer, from)); from = match.next) {
      const event = this.#line(buffer.slice(from, match.at));
      if (event) yield event;
    }
    this.#rest = buffer.slice(from);
  }

  /** A new connection begins: what was left of an event that was cut is dropped, the last id is not. */
  reconnect() {
    this.#rest = "";
    this.#fresh = true;
    this.#event = "";
    this.#data = [];
    this.#id = this.lastId;
    this.#named = false;
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    if (colon === 0) return null; // a comment: the heartbeat
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) [this.#id, this.#named] = [value, true];
    else if (name === "retry" && /^\d+$/.test(value)) this.retry = Number(value);
    return null;
  }

  #dispatch() {
    this.lastId = this.#id;
    const event = { id: this.#id, named: this.#named, event: this.#event || "message", data: this.#data.join("\n") };
    const empty = this.#data.length === 0;
    this.#event = "";
    this.#data = [];
    this.#named = false;
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
 * The place of an event in its channel, from an id `<epoch>-<offset>` or `<prefix>:<epoch>-<offset>`; null for other ids.
 * What the server says between events (`gap`, `stop`, `end` of a query) has an id with a suffix, and no place.
 */
export function place(id) {
  const found = /^(.*?)-(\d+)$/.exec(id);
  return found && { epoch: found[1], offset: Number(found[2]) };
}
