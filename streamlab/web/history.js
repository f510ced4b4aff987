// The history of runs: the latest ones with their figures, retained while the tab is open, and two of them compared.

import { duration, size } from "./figures.js";
import { element } from "./views.js";

/** Maximum number of runs that are retained. */
const RUNS = 20;
/** Maximum length of a request that is retained, in characters. */
const REQUEST = 2000;
const KEY = "streamlab.runs";
const FIGURES = [
  ["First byte", (run) => run.firstByte, duration],
  ["Time", (run) => run.milliseconds, duration],
  ["Bytes", (run) => run.bytes, size],
  ["Rate", (run) => (run.milliseconds > 0 ? (1000 * run.bytes) / run.milliseconds : null), (rate) => `${size(rate)}/s`],
  ["Events", (run) => run.events, new Intl.NumberFormat("en").format],
  ["Chunks", (run) => run.chunks, new Intl.NumberFormat("en").format],
  ["Longest gap", (run) => run.gap, duration],
];
const twoDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hour12: false });

/** The table of runs, newest first; two that are selected are compared below it. */
export class History {
  #section;
  #runs = stored();
  #selected = [];

  constructor(section) {
    this.#section = section;
    section.querySelector("button").addEventListener("click", () => {
      this.#runs = [];
      this.#selected = [];
      this.#store();
      this.#draw();
    });
    this.#draw();
  }

  /** Add a run that has ended; `link` leads back to its form. */
  add(run, { method, url, headers }, link) {
    const { pathname, search } = new URL(url);
    this.#runs.unshift({
      id: `${Date.now()}-${this.#runs.length}`,
      at: Date.now() - (performance.now() - run.startedAt),
      request: decoded(`${method} ${pathname}${search}`).slice(0, REQUEST),
      accept: headers["Accept"] ?? "",
      link,
      state: run.state,
      status: run.status,
      firstByte: run.firstByte,
      milliseconds: run.endedAt - run.startedAt,
      bytes: run.bytes,
      events: run.hasEvents ? run.events : null,
      chunks: run.chunks,
      gap: run.gaps.length ? run.gaps.reduce((one, other) => Math.max(one, other)) : null,
      verdict: run.proof?.verdict().text ?? "",
    });
    this.#runs.splice(RUNS);
    this.#store();
    this.#draw();
  }

  #store() {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(this.#runs));
    } catch {
      // without storage the history ends with the page
    }
  }

  #select(id, chosen) {
    this.#selected = this.#selected.filter((one) => one !== id);
    if (chosen) this.#selected = [...this.#selected, id].slice(-2); // a third one replaces the first
    for (const box of this.#section.querySelectorAll("input")) box.checked = this.#selected.includes(box.value);
    this.#compare();
  }

  #draw() {
    this.#section.hidden = this.#runs.length === 0;
    this.#selected = this.#selected.filter((id) => this.#runs.some((run) => run.id === id));
    const names = ["Compare", "Started", "Request", "State", ...FIGURES.map(([name]) => name)];
    const rows = this.#runs.map((run) => {
      const box = element("input", { type: "checkbox", value: run.id, checked: this.#selected.includes(run.id) });
      box.setAttribute("aria-label", `Compare the run of ${clock.format(run.at)}`);
      box.addEventListener("change", () => this.#select(run.id, box.checked));
      return element(
        "tr",
        {},
        element("td", {}, box),
        element("td", {}, clock.format(run.at)),
        element("td", { className: "request" }, element("a", { href: run.link, title: run.request }, run.request)),
        element("td", {}, `${run.state} ${run.status ?? ""}`.trim()),
        ...FIGURES.map(([, value, format]) => element("td", { className: "number" }, written(value(run), format))),
      );
    });
    const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    this.#section.querySelector(".runs").replaceChildren(table);
    this.#compare();
  }

  /** Show the selected runs side by side, the older one at the left. */
  #compare() {
    const pair = this.#runs.filter(({ id }) => this.#selected.includes(id)).reverse();
    const place = this.#section.querySelector(".pair-of-runs");
    if (pair.length < 2) return place.replaceChildren();
    const words = [
      ["Request", (run) => run.request],
      ["Accept", (run) => run.accept],
      ["State", (run) => `${run.state} ${run.status ?? ""}`.trim()],
      ["Result", (run) => run.verdict],
    ].map(([name, value]) => [name, ...pair.map(value), ""]);
    const figures = FIGURES.map(([name, value, format]) => {
      const [one, other] = pair.map(value);
      return [name, written(one, format), written(other, format), ratio(one, other)];
    });
    const rows = [...words, ...figures].filter(
      ([, one, other]) => ![one, other].every((text) => ["", "–"].includes(text)),
    );
    const times = pair.map((run) => clock.format(run.at));
    const names = ["", `Earlier, ${times[0]}`, `Later, ${times[1]}`, "Ratio"];
    place.replaceChildren(
      element(
        "table",
        {},
        element("caption", {}, "Two runs side by side"),
        element("thead", {}, element("tr", {}, ...names.map((name, at) => element(at ? "th" : "td", {}, name)))),
        element(
          "tbody",
          {},
          ...rows.map(([name, ...cells]) =>
            element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((text) => element("td", {}, text))),
          ),
        ),
      ),
    );
  }
}

/** Describe how one figure compares with another, with two digits: two runs are no statistics. */
function ratio(one, other) {
  if (!(one > 0 && other > 0)) return "";
  return one === other ? "equal" : `${twoDigits.format(other / one)} times`;
}

function written(value, format) {
  return value === null ? "–" : format(value);
}

function decoded(target) {
  try {
    return decodeURIComponent(target.replaceAll("+", " "));
  } catch {
    return target; // a percent sign that begins no escape
  }
}

function stored() {
  try {
    const runs = JSON.parse(sessionStorage.getItem(KEY));
    return Array.isArray(runs) ? runs.slice(0, RUNS) : [];
  } catch {
    return [];
  }
}
