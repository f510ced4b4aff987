// Views of the data as it arrives: the data selects the view, and all retained data is bounded.

import { LineChart } from "./charts.js";
import { remaining, rounded, size } from "./figures.js";
import { rowsOf } from "./sse.js";

const number = new Intl.NumberFormat("en");
const finer = new Intl.NumberFormat("en", { maximumFractionDigits: 4 });

/** Maximum number of characters of text that are retained. */
const TEXT = 65536;
/** Maximum number of rows of a list that are retained. */
const ROWS = 1000;
/** Maximum number of rows of a list that are shown. */
const SHOWN = 200;

/** Create an element with properties and children; text is never parsed as markup. */
export function element(name, properties = {}, ...children) {
  const created = Object.assign(document.createElement(name), properties);
  created.append(...children);
  return created;
}

/** Return text with `code` in it as elements. */
export function prose(text) {
  return text.split("`").map((part, at) => (at % 2 ? element("code", {}, part) : part));
}

/** Return a box with its own scroll bar, which the keyboard reaches. */
function scrollable(className, name, ...children) {
  const box = element("div", { className, tabIndex: 0 }, ...children);
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", name);
  return box;
}

// -- the panel with its tabs

/** The panel: the first tab is the most specific view of the data, then come the events, then the bytes. */
export class Output {
  #tabs;
  #panels;
  #retained;
  #views = [];
  #shown = null;
  #chosen = false;
  #text = null;
  #itemLinks = () => [];

  constructor(section) {
    this.#tabs = section.querySelector("[role=tablist]");
    this.#panels = section.querySelector(".panels");
    this.#retained = section.querySelector("#retained");
    this.#tabs.addEventListener("keydown", (press) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[press.key];
      if (!step) return;
      const at = this.#views.indexOf(this.#shown) + step;
      this.#show(this.#views.at(at % this.#views.length), true);
      this.#shown.tab.focus();
    });
    this.#panels.addEventListener("input", () => this.draw(true)); // a view has its own filter
    this.reset();
  }

  /**
   * Drop all data, and show a text instead. `itemLinks` returns the links of a record, if a list arrives: with `href`,
   * `text` and, of the link that a field becomes, the `name` of the field.
   */
  reset(text = "Press Run: data is shown here as it arrives.", itemLinks = () => []) {
    this.#text = null;
    this.#itemLinks = itemLinks;
    this.#chosen = false;
    this.#set([new Placeholder(text)]);
  }

  /** Create the views for a response, or continue in the existing ones. */
  respond(response, continues) {
    const type = response.headers.get("Content-Type") ?? "";
    if (continues && response.status === 206) return; // its text goes on where it was cut, even within a character
    this.#text = textual(type) ? new TextDecoder() : null;
    if (continues) return;
    const [first, bytes] = [viewOf(type, response.headers), this.#text ? new Text("Bytes") : new Binary("Bytes")];
    this.#set(first ? [first, bytes] : [bytes]);
  }

  bytes(chunk) {
    const text = this.#text?.decode(chunk, { stream: true });
    for (const view of this.#views) view.bytes(chunk, text);
  }

  event(event, json) {
    const events = this.#views.find((view) => view instanceof Events);
    for (const view of this.#views) view.event(event, json);
    // A comparison may report progress before its first measurement.
    const late = this.#views[0] instanceof Progress && Comparison.shows(event, json);
    if (this.#views[0] !== events && !late) return;
    const Specific = [Prices, Progress, Tokens, Log, Comparison, Rows].find((one) => one.shows(event, json));
    if (!Specific) return;
    const specific = new Specific();
    for (const [past, parsed] of events.rows) specific.event(past, parsed);
    this.#set([specific, ...this.#views], this.#chosen ? this.#shown : specific);
  }

  /** Redraw the visible view. `over`: no more data will arrive. */
  draw(over) {
    if (over) this.#tabulate();
    const { follows, scroller } = this.#shown;
    // A reader who has scrolled back is not disturbed; one at the end follows it.
    const following = follows && scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - 8;
    if (follows && !following && !over) return;
    this.#shown.draw(over);
    if (following) scroller.scrollTop = scroller.scrollHeight;
    const text = this.#shown.retained();
    if (this.#retained.textContent !== text) this.#retained.textContent = text;
  }

  /** Show the list in a complete JSON document as a table, too. */
  #tabulate() {
    const records = this.#views[0] instanceof Json && this.#views[0].records();
    if (!records) return;
    const table = new Rows(null, this.#itemLinks);
    table.follows = false; // a list that is complete is read from its beginning
    table.event({}, { rows: records });
    this.#set([table, ...this.#views], this.#chosen ? this.#shown : table);
  }

  #set(views, shown = views[0]) {
    this.#views = views;
    for (const view of views) view.tab ??= this.#tab(view);
    this.#tabs.replaceChildren(...views.map(({ tab }) => tab));
    this.#panels.replaceChildren(...views.map((view) => view.element));
    this.#show(shown, this.#chosen);
  }

  #tab(view) {
    const id = `tab-${view.title.toLowerCase().replace(/\W+/g, "-")}`;
    const tab = element("button", { type: "button", id, onclick: () => this.#show(view, true) }, view.title);
    tab.setAttribute("role", "tab");
    view.element.setAttribute("role", "tabpanel");
    view.element.setAttribute("aria-labelledby", id);
    view.element.tabIndex = 0;
    return tab;
  }

  #show(view, chosen) {
    this.#shown = view;
    this.#chosen = chosen;
    for (const one of this.#views) {
      one.element.hidden = one !== view;
      one.tab.setAttribute("aria-selected", String(one === view));
      one.tab.tabIndex = one === view ? 0 : -1;
    }
    view.stale = true;
    this.draw(true);
  }
}

function textual(type) {
  return /^(text\/|application\/(\w*json|jsonl|x-ndjson|xml|problem\+json))/.test(type) || /charset=/.test(type);
}

function viewOf(type, headers) {
  const media = type.split(";")[0];
  if (media === "text/event-stream") return new Events();
  if (media === "application/problem+json") return new ErrorResponse();
  if (media === "application/jsonl" || media === "application/x-ndjson") return new Rows(lines);
  if (media === "text/csv") return new Rows(csv);
  if (media === "application/json") return new Json();
  if (media === "text/plain") return new Text("Text", true);
  return null;
}

// -- views: each has a title, an element, methods that receive data, and one that draws it

class View {
  /** Whether the view scrolls to its end as data arrives. */
  follows = true;
  stale = true;

  constructor(title, className, ...children) {
    this.title = title;
    this.element = element("div", { className: `panel ${className}` }, ...children);
    this.scroller = this.element;
  }

  bytes() {}
  event() {}
  draw() {}

  /** Describe which part of the data is shown. */
  retained() {
    return "";
  }
}

class Placeholder extends View {
  follows = false;

  constructor(text) {
    super("Output", "empty", element("p", {}, text));
  }
}

/** Text as it arrives; the end of long texts. */
class Text extends View {
  #parts = [];
  #length = 0;
  #total = 0;
  #out = element("pre");

  constructor(title, flowing = false) {
    super(title, flowing ? "flow" : "raw");
    this.element.append(this.#out);
  }

  bytes(_, text) {
    this.#parts.push(text);
    this.#length += text.length;
    this.#total += text.length;
    if (this.#length > 2 * TEXT) this.#trim();
    this.stale = true;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    this.#trim();
    this.#out.textContent = this.#parts[0];
    this.element.classList.toggle("columns", / {3}\S/.test(this.#parts[0])); // a table is laid out with spaces
  }

  retained() {
    const dropped = this.#total - Math.min(this.#total, TEXT);
    return dropped
      ? `The last ${number.format(TEXT)} characters; ${number.format(dropped)} before them were dropped.`
      : "";
  }

  #trim() {
    this.#parts = [this.#parts.join("").slice(-TEXT)];
    this.#length = this.#parts[0].length;
  }
}

/** Bytes that are not text: their number, their beginning, and their end. */
class Binary extends View {
  follows = false;
  #head = new Uint8Array(256);
  #tail = new Uint8Array(0);
  #total = 0;
  #out = element("pre");

  constructor(title) {
    super(title, "raw");
    this.element.append(this.#out);
  }

  bytes(chunk) {
    if (this.#total < 256) this.#head.set(chunk.subarray(0, 256 - this.#total), this.#total);
    this.#total += chunk.length;
    const end = chunk.length >= 256 ? chunk.slice(-256) : Uint8Array.from([...this.#tail, ...chunk]).slice(-256);
    this.#tail = end;
    this.stale = true;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const width = this.element.clientWidth < 540 ? 8 : 16;
    const shown = dump(this.#head.subarray(0, Math.min(256, this.#total)), 0, width);
    const from = Math.max(256, Math.ceil((this.#total - 256) / 16) * 16);
    const rest =
      this.#total > from ? dump(this.#tail.subarray(this.#tail.length - (this.#total - from)), from, width) : [];
    this.#out.textContent = [...shown, ...(from > 256 ? ["…"] : []), ...rest].join("\n");
  }

  retained() {
    return this.#total
      ? `${size(this.#total)} (${number.format(this.#total)} bytes): the first 256 and the last; those between were dropped.`
      : "";
  }
}

function dump(bytes, from, width) {
  const rows = [];
  for (let at = 0; at < bytes.length; at += width) {
    const row = [...bytes.subarray(at, at + width)];
    const codes = row.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    const letters = row.map((byte) => (byte > 31 && byte < 127 ? String.fromCharCode(byte) : "·")).join("");
    rows.push(`${(from + at).toString(16).padStart(8, "0")}  ${codes.padEnd(3 * width - 1)}  ${letters}`);
  }
  return rows;
}

/** A JSON document, indented once it is complete. */
class Json extends Text {
  #text = "";

  constructor() {
    super("JSON");
  }

  bytes(chunk, text) {
    super.bytes(chunk, text);
    if (this.#text.length <= TEXT) this.#text += text;
  }

  draw(over) {
    if (!over || this.#text.length > TEXT) return super.draw();
    try {
      this.element.firstChild.textContent = JSON.stringify(JSON.parse(this.#text), null, 2);
    } catch {
      super.draw(); // it is not complete
    }
    this.follows = false;
  }

  /** Return the records of the document: it is a list of them, or has one; null if not, or while it is incomplete. */
  records() {
    if (this.#text.length > TEXT) return null;
    let json;
    try {
      json = JSON.parse(this.#text);
    } catch {
      return null;
    }
    const lists = [json, ...Object.values(json ?? {})].filter(
      (one) => Array.isArray(one) && one.length && one.every((record) => record?.constructor === Object),
    );
    return lists.length === 1 ? lists[0] : null;
  }
}

/** An error response: its problem document (RFC 9457). */
class ErrorResponse extends View {
  follows = false;
  #text = "";

  constructor() {
    super("Error", "problem");
  }

  bytes(_, text) {
    this.#text += text;
  }

  draw(over) {
    if (!over) return;
    let problem;
    try {
      problem = JSON.parse(this.#text);
    } catch {
      return; // not complete yet
    }
    const faults = (problem.errors ?? []).map(({ in: where, name, detail }) =>
      element("li", {}, `${where} `, element("code", {}, name), `: ${detail}`),
    );
    this.element.replaceChildren(
      element("h3", {}, `${problem.status} ${problem.title}`),
      element("p", {}, problem.detail ?? ""),
      element("ul", {}, ...faults),
    );
  }
}

/** A list that retains the latest rows, and shows the last of those. */
class List extends View {
  rows = [];
  total = 0;

  add(row) {
    this.rows.push(row);
    if (this.rows.length > ROWS + 200) this.rows.splice(0, 200);
    this.total++;
    this.stale = true;
  }

  retained() {
    const shown = Math.min(this.total, SHOWN);
    return this.total > shown ? `The last ${number.format(shown)} of ${number.format(this.total)}.` : "";
  }
}

/** Events as they are: id, name, data. */
class Events extends List {
  #out = element("tbody");

  constructor() {
    super("Events", "table");
    const head = element("tr", {}, ...["id", "event", "data"].map((name) => element("th", { scope: "col" }, name)));
    this.element.append(element("table", { className: "events" }, element("thead", {}, head), this.#out));
  }

  event(event, json) {
    this.add([event, json]);
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    this.#out.replaceChildren(
      ...this.rows.slice(-SHOWN).map(([{ id, event, data }]) => {
        const short = data.length > 300 ? `${data.slice(0, 300)}…` : data;
        return element("tr", {}, element("td", {}, id), element("td", {}, event), element("td", {}, short));
      }),
    );
  }
}

/** Records as a table: JSON lines, CSV, or events with rows. */
class Rows extends List {
  static shows(event, json) {
    return Boolean(rowsOf(event, json)?.every((row) => row && typeof row === "object"));
  }

  #names = [];
  #read;
  #itemLinks;
  #head = element("tr");
  #out = element("tbody");

  constructor(reading, itemLinks = () => []) {
    super("Table", "table");
    this.#itemLinks = itemLinks;
    this.#read = reading?.((record) => this.#addRecord(record));
    this.element.append(element("table", {}, element("thead", {}, this.#head), this.#out));
  }

  bytes(_, text) {
    this.#read?.(text);
  }

  event(event, json) {
    for (const row of rowsOf(event, json) ?? [])
      this.#addRecord(row && typeof row === "object" ? row : { value: row });
  }

  #addRecord(record) {
    for (const name of Object.keys(record))
      if (this.#names.length < 30 && !this.#names.includes(name)) this.#names.push(name);
    this.add(record);
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    this.#head.replaceChildren(...this.#names.map((name) => element("th", { scope: "col" }, name)));
    const cell = (value) => {
      const numeric = typeof value === "number";
      const text = value == null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
      return element("td", { className: numeric ? "number" : "" }, text);
    };
    const rows = this.rows.slice(-SHOWN).map((record) => {
      const cells = this.#names.map((name) => cell(record[name]));
      const others = [];
      for (const { name, text, href } of this.#itemLinks(record))
        if (name) cells[this.#names.indexOf(name)]?.replaceChildren(element("a", { href }, text));
        else others.push(element("a", { href }, text), " ");
      return { cells, others };
    });
    const wider = rows.some(({ others }) => others.length);
    if (wider) this.#head.firstChild.after(element("th", { scope: "col" }, "Methods"));
    this.#out.replaceChildren(
      ...rows.map(({ cells, others }) =>
        element("tr", {}, ...(wider ? cells.toSpliced(1, 0, element("td", {}, ...others)) : cells)),
      ),
    );
  }
}

/** Read JSON lines from chunks of text, and call `emit` with each record. */
function lines(emit) {
  let rest = "";
  return (text) => {
    const found = (rest + text).split("\n");
    rest = found.pop();
    for (const line of found)
      try {
        const record = JSON.parse(line);
        emit(record && typeof record === "object" ? record : { value: record });
      } catch {
        if (line.trim()) emit({ line });
      }
  };
}

/** Read CSV (RFC 4180) from chunks of text, and call `emit` with each record, by the names of the first. */
function csv(emit) {
  let [names, row, cell, quoted, before] = [null, [], "", false, ""];
  return (text) => {
    for (const letter of text) {
      if (quoted) {
        if (letter === '"') quoted = false;
        else cell += letter;
      } else if (letter === '"') {
        quoted = true;
        if (before === '"') cell += letter; // a quote, written twice
      } else if (letter === ",") [row, cell] = [[...row, cell], ""];
      else if (letter === "\n") {
        row.push(cell.replace(/\r$/, ""));
        if (names) emit(Object.fromEntries(names.map((name, at) => [name, row[at] ?? ""])));
        else names = row;
        [row, cell] = [[], ""];
      } else cell += letter;
      before = letter;
    }
  };
}

/** Prices as lines, each as the change since its first price, and a table of the latest prices. */
class Prices extends View {
  static shows(_, json) {
    return typeof json?.symbol === "string" && typeof json.price === "number";
  }

  follows = false;
  #latest = new Map();
  #rows = new Map();
  #box = element("div", { className: "chart" });
  #chart;
  #legend = element("tbody");

  constructor() {
    super("Prices", "prices");
    this.#chart = new LineChart(this.#box, {
      name: "Change of each price since its first",
      y: (value) => `${finer.format(value)} %`,
      step: 50,
      labelled: true,
    });
    const head = element(
      "tr",
      {},
      ...["Symbol", "Price", "Change"].map((name) => element("th", { scope: "col" }, name)),
    );
    this.element.append(
      this.#box,
      scrollable("legend", "Latest prices", element("table", {}, element("thead", {}, head), this.#legend)),
    );
  }

  event(_, json) {
    if (!Prices.shows(null, json)) return;
    const { symbol, price, time } = json;
    const line = this.#latest.get(symbol) ?? { first: price, price, at: -Infinity };
    const timestamp = Date.parse(time);
    // A price sent late is drawn at its own time; a time that goes back does not break the line.
    line.at = Math.max(line.at, Number.isNaN(timestamp) ? Date.now() : timestamp);
    line.price = price;
    if (this.#latest.size >= 40 && !this.#latest.has(symbol)) return;
    this.#latest.set(symbol, line);
    this.#chart.add(symbol, line.at, line.first ? (price / line.first - 1) * 100 : price);
    this.stale = true;
  }

  draw() {
    this.#chart.draw();
    if (!this.stale) return;
    this.stale = false;
    for (const [symbol, { first, price }] of this.#latest) {
      let row = this.#rows.get(symbol);
      if (!row) {
        const cells = [element("td"), element("td")];
        const name = element(
          "th",
          { scope: "row" },
          element("i", { className: `swatch series-${Math.min(this.#rows.size + 1, 8)}` }),
          symbol,
        );
        this.#legend.append(element("tr", {}, name, ...cells));
        this.#rows.set(symbol, (row = cells));
      }
      const change = first ? (price / first - 1) * 100 : 0;
      row[0].textContent = price.toFixed(2);
      const rounded = change.toFixed(2);
      row[1].textContent = `${Number(rounded) < 0 ? "−" : "+"}${rounded.replace("-", "")} %`;
    }
  }
}

/** A task: its progress, rate, remaining time, messages, and end. */
class Progress extends View {
  static shows({ event }, json) {
    return event === "progress" && typeof json?.done === "number";
  }

  follows = false;
  #bar = element("progress", { max: 1, value: 0 });
  #head = element("p", { className: "headline" });
  #figures = element("p", { className: "muted" });
  #end = element("p", { className: "ending" });
  #result = element("pre");
  #list = element("ol");
  #latest = null;
  #ended = null;
  #messages = [];

  constructor() {
    super("Progress", "progress");
    this.#bar.setAttribute("aria-label", "Progress");
    this.element.append(this.#head, this.#bar, this.#figures, this.#end, this.#result, this.#list);
  }

  event(event, json) {
    if (event.event === "progress") {
      // A message is repeated with each step, and may have had its own event before.
      const { message } = json ?? {};
      if (message && message !== this.#latest?.message && message !== this.#messages.at(-1))
        this.#messages.push(message);
      this.#latest = json;
    } else if (event.event === "message") this.#messages.push(json?.message ?? json?.text ?? event.data);
    else if (event.event === "end") this.#ended = json ?? {};
    this.#messages.splice(0, Math.max(0, this.#messages.length - 50));
    this.stale = true;
  }

  draw() {
    if (!this.stale || !this.#latest) return;
    this.stale = false;
    const { state, done, total, unit, rate, eta_seconds: eta } = this.#latest;
    const ended = this.#ended?.state;
    if (total) {
      this.#bar.max = total;
      this.#bar.value = done;
    } else if (ended) this.#bar.value = this.#bar.max;
    else this.#bar.removeAttribute("value"); // the total is unknown
    const share = total ? ` · ${Math.floor((100 * done) / total)} %` : "";
    this.#head.textContent = `${ended ?? state ?? "running"}${share}`;
    const parts = [`${number.format(done)}${total ? ` of ${number.format(total)}` : ""} ${unit ?? ""}`.trim()];
    if (typeof rate === "number") parts.push(`${rounded(rate)} ${unit ?? ""} per second`.replace("  ", " "));
    if (typeof eta === "number" && !ended) parts.push(remaining(eta));
    this.#figures.textContent = parts.join(" · ");
    this.element.dataset.state = ended ?? "running";
    const { result, error } = this.#ended ?? {};
    this.#end.textContent = error
      ? typeof error === "string"
        ? error
        : (error.detail ?? error.message ?? JSON.stringify(error))
      : "";
    this.#result.textContent = result == null ? "" : JSON.stringify(result, null, 2);
    this.#list.replaceChildren(...this.#messages.map((text) => element("li", {}, text)));
  }
}

/** The tokens of a language model. */
class Tokens extends View {
  static shows({ event }, json) {
    return (event === "token" && typeof json?.text === "string") || Array.isArray(json?.choices);
  }

  #text = "";
  #count = 0;
  #from = 0;
  #to = 0;
  #end = null;
  #out = element("pre");

  constructor() {
    super("Text", "flow");
    this.element.append(this.#out);
  }

  event({ event }, json) {
    if (event === "end") this.#end = json;
    const text = event === "token" ? json?.text : (json?.choices?.[0]?.delta?.content ?? "");
    if (text) {
      this.#text = (this.#text + text).slice(-TEXT);
      this.#count++;
      this.#to = performance.now();
      this.#from ||= this.#to;
    }
    this.stale = true;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    this.#out.textContent = this.#text;
  }

  retained() {
    const seconds = (this.#to - this.#from) / 1000;
    const parts = [`${number.format(this.#count)} tokens`];
    if (seconds > 0.2) parts.push(`${rounded((this.#count - 1) / seconds)} per second here`);
    if (this.#end?.finish_reason) parts.push(`ended by ${this.#end.finish_reason}`);
    return parts.join(" · ");
  }
}

/** Lines of a log with their levels, optionally only those that contain a text. */
class Log extends List {
  static shows(_, json) {
    return typeof json?.level === "string" && typeof (json.line ?? json.message) === "string";
  }

  #filter = element("input", {
    type: "search",
    id: "filter",
    placeholder: "only lines with this text",
    spellcheck: false,
  });
  #out = scrollable("lines", "Lines");
  #matching = 0;

  constructor() {
    super("Log", "log");
    this.#filter.addEventListener("input", () => (this.stale = true));
    this.scroller = this.#out;
    const label = element("label", { htmlFor: "filter" }, "Filter ");
    this.element.append(element("div", { className: "filter" }, label, this.#filter), this.#out);
  }

  event({ event }, json) {
    if (Log.shows(null, json)) this.add(json);
    else this.add({ level: "", time: "", line: `— ${event} —` });
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const filter = this.#filter.value.toLowerCase();
    const text = (row) => row.line ?? row.message;
    const found = this.rows.filter((row) => `${row.level} ${text(row)}`.toLowerCase().includes(filter));
    this.#matching = found.length;
    const rows = found.slice(-SHOWN).map((row) => {
      const level = String(row.level).toUpperCase();
      const [line, at] = [text(row), level ? text(row).toUpperCase().indexOf(level) : -1];
      // A line that has its level is shown as it is; before others the level is added.
      const [before, mark, after] =
        at < 0
          ? ["", level.slice(0, 8).padEnd(8), ` ${line}`]
          : [line.slice(0, at), line.slice(at, at + level.length), line.slice(at + level.length)];
      const className = `line level-${level.toLowerCase().replace(/\W/g, "")}`;
      return element("div", { className }, before, element("b", {}, mark), after);
    });
    this.#out.replaceChildren(...rows);
  }

  retained() {
    if (this.#filter.value)
      return `${number.format(this.#matching)} of the last ${number.format(this.rows.length)} lines contain the text.`;
    return super.retained();
  }
}

/** Two modes, measured: bars side by side, and the verdict. */
class Comparison extends View {
  static shows({ event }, json) {
    return event === "measurement" && typeof json?.mode === "string";
  }

  follows = false;
  #measured = [];
  #verdict = "";

  constructor() {
    super("Comparison", "comparison");
  }

  event(event, json) {
    if (Comparison.shows(event, json)) this.#measured.push(json);
    this.#measured.splice(0, this.#measured.length - 40);
    if (event.event === "end") this.#verdict = json?.verdict ?? "";
    this.stale = true;
  }

  draw() {
    if (!this.stale) return;
    this.stale = false;
    const measures = [
      ["ttfb_ms", "First byte", "ms"],
      ["total_ms", "Complete response", "ms"],
      ["peak_rss_mb", "Peak memory", "MB"],
      ["cpu_ms", "Processor", "ms"],
      ["mb_per_s", "Throughput", "MB/s"],
    ];
    const sections = measures.map(([key, title, unit]) => {
      const measured = this.#measured.filter((one) => typeof one[key] === "number");
      const max = Math.max(...measured.map((one) => one[key]));
      const rows = measured.map((one) => {
        const bar = element("i", { className: `bar ${one.mode === "streamed" ? "series-1" : "series-2"}` });
        bar.style.width = `${max > 0 ? Math.max(0.5, (100 * one[key]) / max) : 0}%`;
        const name = element(
          "th",
          { scope: "row" },
          one.mode,
          " ",
          element("small", {}, typeof one.rows === "number" ? `${number.format(one.rows)} rows` : ""),
        );
        return element(
          "tr",
          {},
          name,
          element("td", { className: "bars" }, bar),
          element("td", { className: "number" }, `${rounded(one[key])} ${unit}`),
        );
      });
      return rows.length ? [element("table", {}, element("caption", {}, title), element("tbody", {}, ...rows))] : [];
    });
    this.element.replaceChildren(element("p", { className: "headline" }, this.#verdict), ...sections.flat());
  }
}
