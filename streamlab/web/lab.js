// The lab page: the selected route, its form and its buttons, and one run of it at a time.

import { followed, linkTo } from "./address.js";
import { Figures } from "./figures.js";
import { build } from "./forms.js";
import { History } from "./history.js";
import { curl, itemsOf, load, matching, request, siblings } from "./routes.js";
import { Run } from "./run.js";
import { Output, element, prose } from "./views.js";

/** Interval between two drawings, in milliseconds: independent of the rate of events, and of that of the screen. */
const DRAW_INTERVAL = 80;
/** Time without input after which the address is updated, in milliseconds: browsers limit how often it may change. */
const ADDRESS_INTERVAL = 200;
const STATES = {
  connecting: "Connecting …",
  running: "Running.",
  cut: "Cut.",
  disconnected: "The server is unavailable.",
  done: "Done: the response is complete.",
  stopped: "Stopped.",
  failed: "Failed.",
};

const at = (id) => document.getElementById(id);
const figures = new Figures();
const output = new Output(at("output"));
const runs = new History(at("history"));
const operations = await load().catch((error) => {
  at("bench").replaceChildren(
    element("p", {}, "The routes of this server cannot be read from /openapi.json; its log has the reason."),
  );
  at("bench").removeAttribute("aria-busy");
  throw error;
});

/** The links of the list. Their items lose the ids that browsers without JavaScript need, so that nothing scrolls. */
const links = new Map();
for (const entry of document.querySelectorAll("#list li[id]")) {
  links.set(entry.id, entry.querySelector("a"));
  entry.removeAttribute("id");
}

history.scrollRestoration = "manual";

let operation = null;
let form = null;
let run = null;
let drawTimer = 0;
let drawFrame = 0;
let addressTimer = 0;

// -- the selected route

/** Select a route; `entries` are those of its form, as a link has them. */
function choose(chosen, entries = []) {
  run?.stop();
  run = null;
  operation = chosen;
  const [method, path] = at("route").children;
  method.textContent = chosen.method;
  path.textContent = chosen.path;
  at("summary").replaceChildren(...prose(chosen.summary));
  at("description").replaceChildren(...prose(chosen.description));
  document.title = `${chosen.method} ${chosen.path} · streamlab`;
  form = build(at("fields"), chosen, entries);
  const paces = [...at("pace").options].map(({ value }) => value);
  at("pace").value = entries.find(([name, value]) => name === "@pace" && paces.includes(value))?.[1] ?? usualPace();
  for (const link of links.values()) link.removeAttribute("aria-current");
  links.get(chosen.key)?.setAttribute("aria-current", "true");
  output.reset();
  figures.reset(null);
  at("head").textContent = "";
  at("location").replaceChildren();
  at("headers").querySelector("dl").replaceChildren();
  command();
  buttons();
}

/** Select the route that a response points to. */
function openRoute({ operation, entries }) {
  history.pushState(null, "", linkTo(operation, entries));
  choose(operation, entries);
  at("bench").focus();
}

/** Return the pace of a new form: at full speed a download would end before Cut could be pressed. */
function usualPace() {
  return operation.ranges ? "20000000" : "0";
}

/** Return the link of the filled form. */
function link() {
  const pace = at("pace").value;
  return linkTo(operation, [...form.entries(), ...(pace === usualPace() ? [] : [["@pace", pace]])]);
}

/** Store the filled form in the address, so that it survives a reload and can be shared. */
function updateAddress() {
  clearTimeout(addressTimer);
  history.replaceState(null, "", link());
}

/** Return the links of a record of a list: to the routes of one item, with its id filled in. */
function itemLinks(record) {
  return itemsOf(operations, operation)
    .filter(({ name }) => ["string", "number"].includes(typeof record[name]))
    .map(({ operation: { method, key }, name }) => ({
      href: linkTo({ key }, [[name, String(record[name])]]),
      ...(method === "GET" ? { name, text: String(record[name]) } : { text: method }),
    }));
}

function command() {
  const values = form.values();
  at("curl").textContent = curl(operation, request(operation, values));
  const others = siblings(operations, operation, Object.entries(values.path));
  const targets = others.map(({ operation, entries }) => [operation.method, linkTo(operation, entries)]);
  const anchors = targets.flatMap(([method, href]) => [" ", element("a", { href }, method)]);
  at("methods").replaceChildren(...(anchors.length ? ["With this path:", ...anchors] : []));
}

window.addEventListener("hashchange", () => {
  const target = followed(operations, location.hash);
  if (target) choose(target.operation, target.entries);
  else updateAddress(); // after the link that skips the list of routes
  at("list").classList.remove("open");
  at("unfold").setAttribute("aria-expanded", "false");
  if (target) {
    at("bench").focus({ preventScroll: true });
    window.scrollTo({ top: innerWidth < 900 ? at("bench").offsetTop - 8 : 0 });
  }
});

at("unfold").addEventListener("click", () => {
  const open = at("list").classList.toggle("open");
  at("unfold").setAttribute("aria-expanded", String(open));
});

// -- the search in the routes

const sections = [...document.querySelectorAll("#list section")].map((section) => ({
  section,
  items: [...section.querySelectorAll("li")].map((item) => ({
    item,
    text: `${section.querySelector("h2").textContent} ${item.textContent}`.toLowerCase(),
  })),
}));

at("search").addEventListener("input", () => {
  const words = at("search").value.toLowerCase().split(/\s+/);
  let found = 0;
  for (const { section, items } of sections) {
    for (const { item, text } of items) item.hidden = !words.every((word) => text.includes(word));
    section.hidden = items.every(({ item }) => item.hidden);
    found += items.filter(({ item }) => !item.hidden).length;
  }
  at("found").textContent = found ? (words.some(Boolean) ? `${found} found.` : "") : "No route has all of these words.";
});
at("search").addEventListener("keydown", (press) => {
  if (press.key === "Enter") document.querySelector("#list li:not([hidden]) a")?.click();
});

// -- the run

at("form").addEventListener("input", () => {
  command();
  clearTimeout(addressTimer);
  addressTimer = setTimeout(updateAddress, ADDRESS_INTERVAL);
});
// On a phone a long description is shown up to its second line, and completely once its field has been used.
at("fields").addEventListener("focusin", ({ target }) => target.closest(".field")?.classList.add("used"));
at("form").addEventListener("submit", (submit) => {
  submit.preventDefault();
  run?.stop();
  form.markInvalid([]);
  const message = request(operation, form.values());
  const pace = () => Number(at("pace").value);
  updateAddress();
  const hash = link();
  const record = () => mine.over && runs.add(mine, message, hash);
  const mine = new Run(message, { ranges: operation.ranges, pace, listener: listener(() => run === mine, record) });
  run = mine;
  at("location").replaceChildren();
  output.reset("Request sent; no data yet.", itemLinks);
  figures.reset(run);
  run.start();
  scrollToOutput();
  drawNext(0);
});

/** Scroll to the received data if little of it is visible, as on a phone. */
function scrollToOutput() {
  if (at("output").getBoundingClientRect().top < innerHeight * 0.7) return;
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.querySelector(".controls").scrollIntoView({ behavior: reducedMotion ? "auto" : "smooth" });
}

/** Return the listener of a run: it records a run that has ended, and shows the one that is selected. */
function listener(current, record) {
  return {
    state: () => {
      record();
      if (!current()) return;
      form.markInvalid(run.errors);
      if (run.over) draw(); // draws the complete data of a run that has ended
      buttons();
    },
    response: (response, continues) => current() && respond(response, continues),
    bytes: (chunk) => current() && output.bytes(chunk),
    event: (event, json) => current() && output.event(event, json),
  };
}

function respond(response, continues) {
  figures.respond(response);
  output.respond(response, continues);
  at("head").textContent = `${response.status} ${response.statusText}`;
  const rows = [...response.headers].flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  at("headers")
    .querySelector("dl")
    .replaceChildren(...rows);
  const url = response.headers.get("Location");
  const target = url && matching(operations, "GET", url);
  if (target) {
    const button = element("button", { type: "button", onclick: () => openRoute(target) }, `Open ${url}`);
    at("location").replaceChildren(button);
  }
}

/** Run the form by the keyboard: Enter where the route is selected, Ctrl+Enter (or Command+Enter) anywhere. */
document.addEventListener("keydown", (press) => {
  if (press.key !== "Enter" || !(press.ctrlKey || press.metaKey || press.target === at("bench"))) return;
  press.preventDefault();
  at("form").requestSubmit(at("run"));
});
at("stop").addEventListener("click", () => run.stop());
at("cut").addEventListener("click", () => run.cut());
at("resume").addEventListener("click", () => run.resume());
at("copy").addEventListener("click", async () => {
  const text = at("curl").textContent;
  try {
    await navigator.clipboard.writeText(text);
    at("copy").textContent = "Copied";
    setTimeout(() => (at("copy").textContent = "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren(at("curl")); // no clipboard without HTTPS: select it for copying by hand
  }
});

/** Update the buttons, and the line with the state. */
function buttons() {
  const state = run?.state ?? "";
  const active = Boolean(run) && !run.over;
  const disconnected = state === "cut" || state === "disconnected";
  // The focus moves to the other button when the focused one is disabled.
  const focused = document.activeElement;
  at("stop").disabled = !active;
  at("cut").disabled = state !== "running";
  at("resume").disabled = !disconnected || !run.resumable;
  if (focused === at("cut") && disconnected && run.resumable) at("resume").focus();
  if (focused === at("resume") && state === "running") at("cut").focus();
  document.body.dataset.state = state;
  const line = run ? run.detail || STATES[state] : "";
  if (at("state").textContent !== line) at("state").textContent = line;
  verdict();
}

function verdict() {
  const { mark, text } = verdictOf();
  const line = at("verdict");
  // Announce it when it becomes good or bad, not at each change of its figures.
  if (line.dataset.mark !== mark) at("announcement").textContent = mark ? text : "";
  line.dataset.mark = mark;
  if (line.textContent !== text) line.textContent = text;
}

function verdictOf() {
  if (!run)
    return {
      mark: "",
      text: "Cut the connection while it runs, and resume: this line reports whether data was lost.",
    };
  if (run.state === "cut") {
    const text = run.resumable
      ? `Resume requests the rest (${run.continuation}).`
      : "This response cannot be resumed: it has neither event ids nor ranges. The data is incomplete.";
    return { mark: run.resumable ? "" : "warn", text };
  }
  return run.proof?.verdict() ?? { mark: "", text: "" };
}

/** Draw now, and regularly until the run is over; a hidden page draws when it is visible again. */
function draw() {
  output.draw(run.over);
  figures.draw();
  verdict();
  drawNext(DRAW_INTERVAL);
}

function drawNext(wait) {
  clearTimeout(drawTimer);
  cancelAnimationFrame(drawFrame);
  if (run.over) return;
  const drawn = run;
  drawTimer = setTimeout(() => (drawFrame = requestAnimationFrame(() => run === drawn && draw())), wait);
}

// The first of the list is what a newcomer tries first; routes that are out of service have no link.
const target = followed(operations, location.hash);
const [first] = links.keys();
choose(target?.operation ?? operations.find(({ key }) => key === first), target?.entries);
links.get(operation.key)?.scrollIntoView({ block: "nearest" });
scrollTo(0, 0);
at("bench").removeAttribute("aria-busy");
