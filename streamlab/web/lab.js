// The lab page: the selected route, its form and its buttons, and one run of it at a time.

import { Figures } from "./figures.js";
import { build } from "./forms.js";
import { curl, load, matching, request, simplest } from "./routes.js";
import { Run } from "./run.js";
import { Output, element, prose } from "./views.js";

/** Milliseconds between two drawings: as often as an eye can follow figures, and no burden at any rate of events. */
const DRAWING = 80;
const STATES = {
  connecting: "Connecting …",
  running: "Running.",
  cut: "Cut.",
  away: "The server is unavailable.",
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

/** The links of the list. Their places lose the names that serve browsers without JavaScript: nothing scrolls. */
const listed = new Map();
for (const entry of document.querySelectorAll("#list li[id]")) {
  listed.set(entry.id, entry.querySelector("a"));
  entry.removeAttribute("id");
}

history.scrollRestoration = "manual";
scrollTo(0, 0);

let operation = null;
let form = null;
let run = null;
let drawn = 0;

// -- the route on the bench

/** Select a route; `given` has values of its path parameters. */
function choose(chosen, given) {
  run?.stop();
  run = null;
  operation = chosen;
  const [method, path] = at("route").children;
  method.textContent = chosen.method;
  path.textContent = chosen.path;
  at("summary").replaceChildren(...prose(chosen.summary));
  at("description").replaceChildren(...prose(chosen.description));
  document.title = `${chosen.method} ${chosen.path} · streamlab`;
  form = build(at("fields"), chosen, given);
  // At full speed a download would end before anybody could press Cut.
  at("pace").value = chosen.ranges ? "20000000" : "0";
  for (const link of listed.values()) link.removeAttribute("aria-current");
  listed.get(chosen.key)?.setAttribute("aria-current", "true");
  output.begin();
  figures.begin(null);
  at("head").textContent = "";
  at("there").replaceChildren();
  at("headers").querySelector("dl").replaceChildren();
  command();
  buttons();
}

/** Select the route that a response points to. */
function visit({ operation, values }) {
  history.pushState(null, "", `#${operation.key}`);
  choose(operation, values);
  at("bench").focus();
}

function command() {
  at("curl").textContent = curl(operation, request(operation, form.values()));
}

/** The route that the address names, or null. */
function named() {
  const name = location.hash.slice(1);
  return operations.find(({ key }) => [key, encodeURI(key)].includes(name)) ?? null;
}

window.addEventListener("hashchange", () => {
  const chosen = named();
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
  form.blame([]);
  const asked = request(operation, form.values());
  const pace = () => Number(at("pace").value);
  const mine = new Run(asked, { ranges: operation.ranges, pace, listener: listener(() => run === mine) });
  run = mine;
  at("there").replaceChildren();
  output.begin("Request sent; no data yet.");
  figures.begin(run);
  run.start();
  reveal();
  requestAnimationFrame(draw);
});

/** Where little of what arrives would be in sight, as on a phone, bring it there. */
function reveal() {
  if (at("output").getBoundingClientRect().top < innerHeight * 0.7) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.querySelector(".controls").scrollIntoView({ behavior: still ? "auto" : "smooth" });
}

/** Return the listener of a run; it ignores a run that is no longer selected. */
function listener(current) {
  return {
    state: () => {
      if (!current()) return;
      form.blame(run.errors);
      if (run.over) draw(performance.now()); // a run that is over has been drawn completely
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
  const there = response.headers.get("Location");
  const target = there && matching(operations, "GET", new URL(there, location.href).pathname);
  if (target)
    at("there").replaceChildren(element("button", { type: "button", onclick: () => visit(target) }, `Open ${there}`));
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
    getSelection().selectAllChildren(at("curl")); // no clipboard without HTTPS: selected, to be copied by hand
  }
});

/** Update the buttons, and the line with the state. */
function buttons() {
  const state = run?.state ?? "";
  const going = Boolean(run) && !run.over;
  const parked = state === "cut" || state === "away";
  // The focus moves to the next button if its button is disabled.
  const focused = document.activeElement;
  at("stop").disabled = !going;
  at("cut").disabled = state !== "running";
  at("resume").disabled = !parked || !run.resumable;
  if (focused === at("cut") && parked && run.resumable) at("resume").focus();
  if (focused === at("resume") && state === "running") at("cut").focus();
  document.body.dataset.state = state;
  const line = run ? run.detail || STATES[state] : "";
  if (at("state").textContent !== line) at("state").textContent = line;
  verdict();
}

function verdict() {
  const { mark, text } = verdictOf();
  const line = at("verdict");
  // Read out once when it turns good or bad, and not again whenever its figures change.
  if (line.dataset.mark !== mark) at("heard").textContent = mark ? text : "";
  line.dataset.mark = mark;
  if (line.textContent !== text) line.textContent = text;
}

function verdictOf() {
  if (!run)
    return {
      mark: "",
      text: "Cut the connection while it runs, and resume: this line reports whether anything was lost.",
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
  if (over || now - drawn >= DRAWING) {
    drawn = now;
    output.draw(over);
    figures.draw();
    verdict();
  }
  if (!over) requestAnimationFrame(draw);
}

// Routes that are out of service are not in the list, and no welcome.
choose(named() ?? simplest(operations.filter(({ key }) => listed.has(key))));
at("bench").removeAttribute("aria-busy");
