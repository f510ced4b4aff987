// The form of an operation: a control for each parameter, with its type, bounds, default and example.

import { element, prose } from "./views.js";

const number = new Intl.NumberFormat("en");

/**
 * Fill `container` with the fields of an operation, and return the form. `entries` are pairs of a name and a value, as a
 * link has them: of a parameter, or of `@accept`, `@more`, `@type` and `@body`.
 */
export function build(container, operation, entries = []) {
  // Required parameters come first.
  const parameters = [...operation.parameters].sort((one, other) => other.required - one.required);
  const fields = parameters.map(field);
  // The button Resume sends the last event id by itself; setting it by hand is rarely needed.
  const rare = fields.filter(({ parameter }) => parameter.name === "last_event_id");
  const grid = element(
    "div",
    { className: "grid" },
    ...fields.filter((field) => !rare.includes(field)).map(({ node }) => node),
  );
  /** Every control of the form, by its name in a link. */
  const controls = new Map(fields.map(({ parameter, control }) => [parameter.name, control]));
  const add = (name, control) => {
    controls.set(name, control);
    return control;
  };
  let accept = null;
  if (operation.media.length > 1) {
    accept = add("@accept", select(operation.media, operation.accept, "*/*"));
    grid.append(choice("Accept", accept, "Media type to request. Default: the choice of the server."));
  }
  container.replaceChildren(grid);

  let more = null;
  let details = null;
  if (operation.parameters.some(({ where }) => where === "query")) {
    more = add("@more", text(element("input", { id: "more", type: "text", placeholder: "name=value&name=value" })));
    const label = element("label", { htmlFor: "more" }, "Other parameters");
    const help = element("small", {}, "Sent unchanged, after the other parameters.");
    const field = element("div", { className: "field" }, label, more.node, help);
    details = element(
      "details",
      { className: "more" },
      element("summary", {}, "More parameters"),
      element("div", { className: "grid" }, ...rare.map(({ node }) => node), field),
    );
    container.append(details);
  }

  let type = null;
  let body = null;
  if (operation.body) {
    const rows = Math.min(10, operation.body.example.split("\n").length + 1);
    body = add("@body", text(element("textarea", { id: "body", value: operation.body.example, rows })));
    body.node.setAttribute("aria-describedby", "body-help");
    const row = element(
      "div",
      { className: "field body" },
      element("label", { htmlFor: "body" }, "Body"),
      body.node,
      element("small", { id: "body-help" }, ...prose(operation.body.description)),
      fault("body"),
    );
    if (operation.body.types.length > 1) {
      type = add("@type", select(operation.body.types, operation.body.types[0], null));
      row.prepend(choice("Content-Type", type, ""));
    }
    container.append(row);
  }

  const initial = new Map([...controls].map(([name, control]) => [name, control.values()]));
  for (const [name, control] of controls) {
    const entered = entries.filter(([one]) => one === name).map(([, value]) => value);
    if (entered.length) control.enter(entered.filter(Boolean));
  }
  if (details) details.open = [...rare.map(({ control }) => control), more].some((one) => one.values().length);

  return {
    /** Return the values of the form, for `routes.request`. */
    values() {
      const path = {};
      const query = [];
      for (const { parameter, control } of fields)
        if (parameter.where === "path") path[parameter.name] = control.values()[0] ?? "";
        else for (const value of control.values()) query.push([parameter.name, value]);
      return {
        path,
        query,
        more: more?.values()[0]?.trim() ?? "",
        accept: accept?.values()[0] ?? "",
        type: type?.values()[0] ?? operation.body?.types[0] ?? "",
        body: body ? (body.values()[0] ?? "") : null,
      };
    },

    /** Return what differs from the empty form, as pairs of a name and a value; an emptied field has the value "". */
    entries() {
      return [...controls].flatMap(([name, control]) => {
        const values = control.values();
        if (values.join("\n") === initial.get(name).join("\n")) return [];
        return values.length ? values.map((value) => [name, value]) : [[name, ""]];
      });
    },

    /** Mark the fields that an error response names as invalid, and no others. */
    markInvalid(errors) {
      for (const { control, parameter } of fields)
        mark(
          control.node,
          errors.filter(({ name }) => name === parameter.name),
        );
      if (body)
        mark(
          body.node,
          errors.filter((error) => error.in === "body"),
        );
    },
  };
}

function mark(node, errors) {
  const fault = node.closest(".field").querySelector(".fault");
  fault.textContent = errors.map(({ detail }) => detail).join("; ");
  if (errors.length) node.setAttribute("aria-invalid", "true");
  else node.removeAttribute("aria-invalid");
}

function fault(name) {
  return element("small", { id: `${name}-fault`, className: "fault" });
}

function field(parameter) {
  const { name, shape, required, description, example } = parameter;
  const id = `field-${name}`;
  // Required values are filled in; optional ones only have a placeholder.
  const values = required ? [example ?? shape.default ?? []].flat().map(String) : [];
  const control = make(shape, values, required);
  const { node, single } = control;
  node.id = id;
  node.setAttribute("aria-describedby", `${id}-help ${id}-fault`);
  if (required && single) node.required = true;
  if ("placeholder" in node) node.placeholder = suggestion(shape, example);
  const title = [element("code", {}, name), required ? " (required)" : ""];
  const label = single ? element("label", { htmlFor: id }, ...title) : element("span", { id: `${id}-label` }, ...title);
  if (!single) node.setAttribute("aria-labelledby", `${id}-label`);
  const help = element("small", { id: `${id}-help` }, ...prose([description, hint(shape)].filter(Boolean).join(" ")));
  return { parameter, control, node: element("div", { className: "field" }, label, node, help, fault(id)) };
}

// -- controls: each has a node, the values it has, and takes those that were entered

function make(shape, values, required) {
  const [value = ""] = values;
  const none = required ? null : shape.default == null ? "not set" : `${shape.default} (default)`;
  if (shape.enum) return select(shape.enum, value, none);
  if (shape.type === "boolean" && typeof shape.default === "boolean")
    return select([String(!shape.default)], value, `${shape.default} (default)`);
  if (shape.type === "boolean") return select(["true", "false"], value, none);
  if (shape.type === "array" && shape.items?.enum) return checkboxes(shape.items.enum, values);
  if (shape.type === "array")
    return lines(element("textarea", { rows: Math.max(1, values.length), value: values.join("\n") }));
  const numeric = shape.type === "integer" || shape.type === "number";
  const control = text(element("input", { type: "text", value }));
  if (numeric) control.node.inputMode = shape.type === "integer" ? "numeric" : "decimal";
  return control;
}

/** Return a control for one value, which may be empty. */
function text(node) {
  node.spellcheck = false;
  return {
    node,
    single: true,
    values: () => (node.value === "" ? [] : [node.value]),
    enter: (values) => (node.value = values.at(-1) ?? ""),
  };
}

/** Return a control for a list of values, one per line. */
function lines(node) {
  const values = () =>
    node.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
  return { ...text(node), values, enter: (values) => (node.value = values.join("\n")) };
}

/** Return a control for one of some values; `none` describes the choice of no value, if there is one. */
function select(values, value, none) {
  const options = values.map((one) => element("option", { value: one }, String(one)));
  if (none !== null) options.unshift(element("option", { value: "" }, none));
  const node = element("select", {}, ...options);
  if (values.map(String).includes(value)) node.value = value;
  const enter = ([value = ""]) => {
    // A link may have a value that the server no longer declares: the server rejects it, with the reason.
    if (value && !values.map(String).includes(value)) node.append(element("option", { value }, value));
    node.value = value;
  };
  return { ...text(node), enter };
}

/** Return a control for any of some values. */
function checkboxes(choices, values) {
  const boxes = choices.map((value) =>
    element("input", { type: "checkbox", value, checked: values.includes(String(value)) }),
  );
  const labels = boxes.map((box) => element("label", {}, box, ` ${box.value}`));
  const node = element("div", { className: "boxes" }, ...labels);
  node.setAttribute("role", "group");
  return {
    node,
    single: false,
    values: () => boxes.filter(({ checked }) => checked).map(({ value }) => value),
    enter: (entered) => boxes.forEach((box) => (box.checked = entered.includes(box.value))),
  };
}

function choice(name, { node }, description) {
  node.id = `choice-${name}`;
  const label = element("label", { htmlFor: node.id }, element("code", {}, name));
  return element("div", { className: "field" }, label, node, element("small", {}, description));
}

function suggestion(shape, example) {
  if (example !== undefined) return `e.g. ${[example].flat().join(", ")}`;
  const fallback = shape.default;
  return fallback == null || fallback === "" || Array.isArray(fallback) ? "" : `${fallback}`;
}

/** Describe the type and the bounds of a parameter. */
function hint(shape) {
  if (shape.enum || shape.items?.enum || shape.type === "boolean") return "";
  const parts = [{ array: "One per line", integer: "Integer", number: "Number" }[shape.type] ?? "Text"];
  const minimum = shape.minimum ?? shape.exclusiveMinimum;
  const maximum = shape.maximum ?? shape.exclusiveMaximum;
  const [from, to] = [minimum, maximum].map((bound) => bound !== undefined && number.format(bound));
  if (from && to) parts.push(`${from} to ${to}`);
  else if (from) parts.push(`from ${from}`);
  else if (to) parts.push(`up to ${to}`);
  else if (shape.maxLength !== undefined) parts.push(`${number.format(shape.maxLength)} characters maximum`);
  return `${parts.join(", ")}.`;
}
