// Line charts on canvas: bounded memory at any rate of points, drawn on demand, in a box of constant size.

/** Maximum number of points that each line retains. */
const MAX_POINTS = 900;

const palette = matchMedia("(prefers-color-scheme: dark)");

/**
 * A chart of one or several lines. `name`: what they show, in words. `step`: the smallest difference of x that is drawn; points within it are reduced to
 * their minimum, maximum and last. `y` and `x` format a number for the axes; `floor`: a y that is always visible.
 */
export class LineChart {
  #host;
  #canvas = document.createElement("canvas");
  #lines = new Map();
  #options;
  #stale = true;
  #colours = null;
  #name = "";

  constructor(host, options) {
    this.#host = host;
    this.#options = { step: 0.25, floor: undefined, filled: false, labelled: false, ...options };
    this.#canvas.setAttribute("role", "img");
    this.name = this.#options.name;
    host.replaceChildren(this.#canvas);
    new ResizeObserver(() => this.#redraw()).observe(host);
    palette.addEventListener("change", () => {
      this.#colours = null;
      this.#redraw();
    });
  }

  set name(name) {
    this.#name = name;
    this.#describe();
  }

  /** Names of the lines, in the order of their colours. */
  get names() {
    return [...this.#lines.keys()];
  }

  clear() {
    this.#lines.clear();
    this.#describe();
    this.#redraw();
  }

  add(name, x, y) {
    let line = this.#lines.get(name);
    if (!line) this.#lines.set(name, (line = []));
    const last = line.at(-1);
    if (last && x - last.x < this.#options.step) {
      last.min = Math.min(last.min, y);
      last.max = Math.max(last.max, y);
      last.y = y;
    } else {
      line.push({ x, y, min: y, max: y });
      if (line.length > MAX_POINTS + 100) line.splice(0, 100);
    }
    this.#stale = true;
  }

  /** Redraw the canvas if the data has changed. */
  draw() {
    if (!this.#stale) return;
    this.#stale = false;
    const { clientWidth: width, clientHeight: height } = this.#host;
    if (!width || !height) return;
    const scale = devicePixelRatio;
    if (this.#canvas.width !== Math.round(width * scale)) this.#canvas.width = Math.round(width * scale);
    if (this.#canvas.height !== Math.round(height * scale)) this.#canvas.height = Math.round(height * scale);
    const pen = this.#canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.#colours ??= colours(this.#host);
    const bounds = this.#bounds();
    if (!bounds) return;
    this.#plot(pen, bounds, width, height);
    this.#describe();
  }

  #redraw() {
    this.#stale = true;
    requestAnimationFrame(() => this.draw());
  }

  #bounds() {
    const { floor } = this.#options;
    let [left, right, low, high] = [Infinity, -Infinity, floor ?? Infinity, floor ?? -Infinity];
    for (const line of this.#lines.values()) {
      left = Math.min(left, line[0].x);
      right = Math.max(right, line.at(-1).x);
      for (const { min, max } of line) {
        if (min < low) low = min;
        if (max > high) high = max;
      }
    }
    if (left === Infinity) return null;
    if (high === low) [low, high] = floor === undefined ? [low - 1, high + 1] : [low, high + 1];
    return { left, right: Math.max(right, left + this.#options.step * 8), low, high };
  }

  #plot(pen, { left, right, low, high }, width, height) {
    const { y: format, filled, labelled } = this.#options;
    let ticks = steps(low, high, height < 120 ? 2 : 4);
    if (this.#options.floor === undefined) {
      // Lines without a floor fill the box; only grid lines inside it are drawn.
      ticks = ticks.filter((tick) => tick >= low && tick <= high);
      [low, high] = [low - (high - low) * 0.04, high + (high - low) * 0.04];
    } else [low, high] = [ticks[0], ticks.at(-1)];
    const { ink, grid, series } = this.#colours;
    pen.font = "11px system-ui, sans-serif";
    const margin = Math.max(0, ...ticks.map((tick) => pen.measureText(format(tick)).width)) + 10;
    const after = labelled ? 46 : 6;
    const across = (x) => margin + ((x - left) / (right - left)) * (width - margin - after);
    const up = (y) => height - 8 - ((y - low) / (high - low)) * (height - 18);
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    pen.lineWidth = 1;
    for (const tick of ticks) {
      const at = Math.round(up(tick)) + 0.5;
      pen.strokeStyle = grid;
      pen.beginPath();
      pen.moveTo(margin, at);
      pen.lineTo(width - after, at);
      pen.stroke();
      pen.fillStyle = ink;
      pen.fillText(format(tick), margin - 6, at);
    }
    const ends = [];
    [...this.#lines].forEach(([name, line], number) => {
      const colour = series[Math.min(number, series.length - 1)];
      pen.strokeStyle = colour;
      pen.lineWidth = 1.75;
      pen.lineJoin = "round";
      pen.beginPath();
      let at = null;
      for (const { x, y, min, max } of line) {
        const here = across(x);
        if (at === null) pen.moveTo(here, up(y));
        if (max - min > 0) {
          pen.lineTo(here, up(min));
          pen.lineTo(here, up(max));
        }
        pen.lineTo(here, up(y));
        at = here;
      }
      pen.stroke();
      if (filled) {
        pen.lineTo(at, up(low));
        pen.lineTo(across(line[0].x), up(low));
        pen.globalAlpha = 0.12;
        pen.fillStyle = colour;
        pen.fill();
        pen.globalAlpha = 1;
      }
      ends.push({ name, colour, y: up(line.at(-1).y) });
    });
    if (labelled) label(pen, ends, width - after + 5, height);
  }

  /** Describe the chart in words, for those who do not see it. */
  #describe() {
    const { y: format } = this.#options;
    const lines = [...this.#lines].slice(0, 12);
    const latest = lines.map(([name, line]) => `${name && `${name} `}${format(line.at(-1).y)}`).join(", ");
    this.#canvas.setAttribute("aria-label", `${this.#name}: ${latest || "no data yet"}`);
  }
}

/** Draw names at the ends of their lines, moved apart where they would overlap. */
function label(pen, ends, x, height) {
  pen.textAlign = "left";
  ends = ends.slice(0, Math.floor((height - 8) / 12)).sort((one, other) => one.y - other.y);
  ends.forEach((end, at) => (end.y = Math.max(end.y, at ? ends[at - 1].y + 12 : 6)));
  ends.reverse().forEach((end, at) => (end.y = Math.min(end.y, at ? ends[at - 1].y - 12 : height - 6)));
  for (const { name, colour, y } of ends) {
    pen.fillStyle = colour;
    pen.fillText(name.slice(0, 6), x, y);
  }
}

/** Return about `count` round numbers that cover the range from `low` to `high`. */
function steps(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((times) => times * unit).find((one) => one >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, at) => Number(((first + at) * step).toPrecision(12)));
}

function colours(host) {
  const style = getComputedStyle(host);
  const named = (name) => style.getPropertyValue(name).trim();
  return {
    ink: named("--muted"),
    grid: named("--line"),
    series: [1, 2, 3, 4, 5, 6, 7, 8].map((number) => named(`--series-${number}`)),
  };
}
