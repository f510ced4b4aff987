// The lab page: the selected route, its form and its buttons, and one run of it at a time.

import { Figures } from "./figures.js";
import { build } from "./forms.js";
import { curl, load, matching, request, simplest } from "./routes.js";
import { Run } from "./run.js";
import { Output, element, prose } from "./views.js";

/** Minimum interval between two drawings, in milliseconds: independent of the rate of events. */
const DRAW_INTERVAL = 80;
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
scrollTo(0, 0);

let operation = null;
let form = null;
let run = null;
let drawn = 0;

// -- the selected route

/** Select a route; `values` are those of its path parameters. */
function choose(chosen, values) {
  run?.stop();
  run = null;
  operation = chosen;
  const [method, path] = at("route").children;
  method.textContent = chosen.method;
  path.textContent = chosen.path;
  at("summary").replaceChildren(...prose(chosen.summary));
  at("description").replaceChildren(...prose(chosen.description));
  document.title = `${chosen.method} ${chosen.path} · streamlab`;
  form = build(at("fields"), chosen, values);
  // At full speed a download would end before Cut could be pressed.
  at("pace").value = chosen.ranges ? "20000000" : "0";
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
function openRoute({ operation, values }) {
  history.pushState(null, "", `#${operation.key}`);
  choose(operation, values);
  at("bench").focus();
}

function command() {
  at("curl").textContent = curl(operation, request(operation, form.values()));
}

/** Return the route in the address, or null. */
function routeInAddress() {
  const name = location.hash.slice(1);
  return operations.find(({ key }) => [key, encodeURI(key)].includes(name)) ?? null;
}

window.addEventListener("hashchange", () => {
  const chosen = routeInAddress();
  if (chosen && chosen !== operation) choose(chosen);
  at("list").classList.remove("open");
  at("unfold").setAttribute("aria-expanded", "false");
  if (chosen) {
    at("bench").focus({ preventScroll: true });
    window.scrollTo({ top: innerWidth < 900 ? at("bench").offsetTop - 8 : 0 });
  }
});

at("unfold").addEventListener("click", () => {
  const open = at("list").classList.toggle("open");
  at("unfold").setAttribute("aria-expanded", String(open));
});

// -- the run

at("form").addEventListener("input", command);
at("form").addEventListener("submit", (submit) => {
  submit.preventDefault();
  run?.stop();
  form.markInvalid([]);
  const message = request(operation, form.values());
  const pace = () => Number(at("pace").value);
  const mine = new Run(message, { ranges: operation.ranges, pace, listener: listener(() => run === mine) });
  run = mine;
  at("location").replaceChildren();
  output.reset("Request sent; no data yet.");
  figures.reset(run);
  run.start();
  scrollToOutput();
  requestAnimationFrame(draw);
});

/** Scroll to the received data if little of it is visible, as on a phone. */
function scrollToOutput() {
  if (at("output").getBoundingClientRect().top < innerHeight * 0.7) return;
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.querySelector(".controls").scrollIntoView({ behavior: reducedMotion ? "auto" : "smooth" });
}

/** Return the listener of a run; it ignores a run that is no longer selected. */
function listener(current) {
  return {
    state: () => {
      if (!current()) return;
      form.markInvalid(run.errors);
      if (run.over) draw(performance.now()); // draws the complete data of a run that has ended
      buttons();
    },
    response: (response) => current() && respond(response),
    bytes: (chunk) => current() && output.bytes(chunk),
    event: (event, json) => current() && output.event(event, json),
  };
}

function respond(response) {
  figures.respond(response);
  output.respond(response);
  at("head").textContent = `${response.status} ${response.statusText}`;
  const rows = [...response.headers].flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  at("headers")
    .querySelector("dl")
    .replaceChildren(...rows);
  const url = response.headers.get("Location");
  const target = url && matching(operations, "GET", new URL(url, location.href).pathname);
  if (target) {
    const button = element("button", { type: "button", onclick: () => openRoute(target) }, `Open ${url}`);
    at("location").replaceChildren(button);
  }
}

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

function draw(now) {
  if (!run) return;
  const over = run.over;
  if (over || now - drawn >= DRAW_INTERVAL) {
    drawn = now;
    output.draw(over);
    figures.draw();
    verdict();
  }
  if (!over) requestAnimationFrame(draw);
}

// Routes that are out of service have no link, and are not selected at first.
choose(routeInAddress() ?? simplest(operations.filter(({ key }) => links.has(key))));
at("bench").removeAttribute("aria-busy");
