// Figures and charts of a run, and of the server while it runs: first byte, rates, gaps, memory, open streams.

import { LineChart } from "./charts.js";

const number = new Intl.NumberFormat("en");
const significant = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const SECOND = 1000;
/** Interval between two points of the rate charts, in milliseconds; each is the rate over the last second. */
const SAMPLE = 250;

/** Format a size in bytes for people. */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; bytes >= 999.95 && at < units.length - 1; at++) bytes /= 1000;
  return `${at === 0 ? number.format(Math.round(bytes)) : bytes.toFixed(bytes < 10 ? 2 : 1)} ${units[at]}`;
}

/** Format a number with three significant digits, which is what measurements of one run are good for. */
export function rounded(value) {
  return significant.format(value);
}

/** Format a duration in milliseconds for people. */
export function duration(milliseconds) {
  if (milliseconds < 1) return "< 1 ms";
  if (milliseconds < 10 * SECOND) return `${number.format(Math.round(milliseconds))} ms`;
  return `${(milliseconds / SECOND).toFixed(1)} s`;
}

/** Format an estimate of the time left, in seconds, no finer than an estimate is. */
export function remaining(seconds) {
  if (seconds < 1) return "less than 1 s left";
  if (seconds < 90) return `about ${Math.round(seconds)} s left`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} min left`;
  return `about ${Math.round(seconds / 3600)} h left`;
}

export class Figures {
  #run = null;
  #counts = [];
  #poll = 0;
  #bytes = new LineChart(byId("chart-bytes"), { name: "Bytes per second", y: round, floor: 0, filled: true });
  #items = new LineChart(byId("chart-count"), { name: "Chunks per second", y: short, floor: 0, filled: true });
  #memory = new LineChart(byId("chart-memory"), { name: "Server memory", y: round, floor: 0, filled: true });

  /** Reset everything, for a run or for none. */
  reset(run) {
    this.#run = run;
    this.#counts = [{ bytes: 0, items: 0, at: performance.now() }];
    for (const chart of [this.#bytes, this.#items, this.#memory]) chart.clear();
    for (const id of ["status", "ttfb", "bytes", "count", "gaps", "memory", "streams"]) byId(id).textContent = "–";
    this.#name("Chunks");
    clearTimeout(this.#poll);
    if (run) this.#watch(run);
  }

  respond(response) {
    byId("status").textContent = response.status;
    this.#name(this.#run.hasEvents ? "Events" : "Chunks");
  }

  /** Show the current figures. */
  draw() {
    const run = this.#run;
    if (!run) return;
    this.#sample(performance.now());
    if (run.firstByte !== null) write("ttfb", duration(run.firstByte));
    write("bytes", size(run.bytes));
    write("count", number.format(this.#counted()));
    if (run.gaps.length) {
      const sorted = Float64Array.from(run.gaps).sort();
      write("gaps", [sorted[0], sorted[sorted.length >> 1], sorted.at(-1)].map(duration).join(" · "));
    }
    for (const chart of [this.#bytes, this.#items, this.#memory]) chart.draw();
  }

  #counted() {
    return this.#run.hasEvents ? this.#run.events : this.#run.chunks;
  }

  #name(items) {
    byId("count-name").textContent = items;
    byId("chart-count-name").textContent = this.#items.name = `${items} per second`;
  }

  /** Add a point to the rate charts, at most every SAMPLE milliseconds while data arrives. */
  #sample(now) {
    const run = this.#run;
    if (now - this.#counts.at(-1).at < SAMPLE || run.over) return;
    const count = { bytes: run.bytes, items: this.#counted(), at: now };
    this.#counts.push(count);
    while (this.#counts.length > 2 && now - this.#counts[1].at >= SECOND) this.#counts.shift();
    const before = this.#counts[0];
    const [x, seconds] = [(now - run.startedAt) / SECOND, (now - before.at) / SECOND];
    this.#bytes.add("", x, (count.bytes - before.bytes) / seconds);
    this.#items.add("", x, (count.items - before.items) / seconds);
  }

  /** Read the server's metrics, about once per second during the run, and once after it. */
  async #watch(run) {
    const last = run.over;
    try {
      const text = await (await fetch("metrics", { cache: "no-store" })).text();
      if (run !== this.#run) return;
      const memory = /^process_resident_memory_bytes (\S+)/m.exec(text);
      const open = [...text.matchAll(/^streamlab_open_streams\{[^}]*\} (\S+)/gm)];
      if (memory) {
        byId("memory").textContent = size(Number(memory[1]));
        this.#memory.add("", (performance.now() - run.startedAt) / SECOND, Number(memory[1]));
        this.#memory.draw();
      }
      byId("streams").textContent = number.format(open.reduce((sum, [, value]) => sum + Number(value), 0));
    } catch {
      if (run !== this.#run) return;
      byId("memory").textContent = byId("streams").textContent = "–"; // the server is unavailable
    }
    if (!last) this.#poll = setTimeout(() => this.#watch(run), SECOND);
  }
}

function round(bytes) {
  return size(bytes).replace(/\.0+ /, " ");
}

function short(value) {
  return value >= 1e6 ? `${rounded(value / 1e6)} M` : value >= 1e3 ? `${rounded(value / 1e3)} k` : rounded(value);
}

/** Write a figure; one that has not changed would be laid out and painted again. */
function write(id, text) {
  const figure = byId(id);
  if (figure.textContent !== text) figure.textContent = text;
}

function byId(id) {
  return document.getElementById(id);
}
