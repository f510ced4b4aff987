// The form of an operation: a control for each parameter, with its type, bounds, default and example.

import { element, prose } from "./views.js";

const number = new Intl.NumberFormat("en");

/** Fill `container` with the fields of an operation; `values` are those of path parameters. Return the form. */
export function build(container, operation, values = {}) {
  // Required parameters come first.
  const parameters = [...operation.parameters].sort((one, other) => other.required - one.required);
  const fields = parameters.map((parameter) => field(parameter, values[parameter.name]));
  // The button Resume sends the last event id by itself; setting it by hand is rarely needed.
  const rare = fields.filter(({ parameter }) => parameter.name === "last_event_id");
  const grid = element(
    "div",
    { className: "grid" },
    ...fields.filter((field) => !rare.includes(field)).map(({ node }) => node),
  );
  const accept =
    operation.media.length > 1
      ? choice("Accept", "Media type to request. Default: the choice of the server.", operation.media, operation.accept)
      : null;
  if (accept) grid.append(accept.node);
  container.replaceChildren(grid);

  let more = null;
  if (operation.parameters.some(({ where }) => where === "query")) {
    more = element("input", { id: "more", type: "text", placeholder: "name=value&name=value", spellcheck: false });
    const label = element("label", { htmlFor: "more" }, "Other parameters");
    const help = element("small", {}, "Sent unchanged, after the other parameters.");
    const fields = [...rare.map(({ node }) => node), element("div", { className: "field" }, label, more, help)];
    container.append(
      element(
        "details",
        { className: "more" },
        element("summary", {}, "More parameters"),
        element("div", { className: "grid" }, ...fields),
      ),
    );
  }

  let type = null;
  let body = null;
  if (operation.body) {
    body = element("textarea", {
      id: "body",
      value: operation.body.example,
      spellcheck: false,
      rows: Math.min(10, operation.body.example.split("\n").length + 1),
    });
    body.setAttribute("aria-describedby", "body-help");
    const help = element("small", { id: "body-help" }, ...prose(operation.body.description));
    const row = element(
      "div",
      { className: "field body" },
      element("label", { htmlFor: "body" }, "Body"),
      body,
      help,
      fault("body"),
    );
    if (operation.body.types.length > 1) {
      type = choice("Content-Type", "", operation.body.types, operation.body.types[0], false);
      row.prepend(type.node);
    }
    container.append(row);
  }

  return {
    /** Return the values of the form, for `routes.request`. */
    values() {
      const path = {};
      const query = [];
      for (const { parameter, read } of fields)
        if (parameter.where === "path") path[parameter.name] = read()[0] ?? "";
        else for (const value of read()) query.push([parameter.name, value]);
      return {
        path,
        query,
        more: more?.value.trim() ?? "",
        accept: accept?.control.value ?? "",
        type: type?.control.value ?? operation.body?.types[0] ?? "",
        body: body ? body.value : null,
      };
    },

    /** Mark the fields that an error response names as invalid, and no others. */
    markInvalid(errors) {
      for (const { control, parameter } of fields)
        mark(
          control,
          errors.filter(({ name }) => name === parameter.name),
        );
      if (body)
        mark(
          body,
          errors.filter((error) => error.in === "body"),
        );
    },
  };
}

function mark(control, errors) {
  const fault = control.closest(".field").querySelector(".fault");
  fault.textContent = errors.map(({ detail }) => detail).join("; ");
  if (errors.length) control.setAttribute("aria-invalid", "true");
  else control.removeAttribute("aria-invalid");
}

function fault(name) {
  return element("small", { id: `${name}-fault`, className: "fault" });
}

function field(parameter, preset) {
  const { name, shape, required, description, example } = parameter;
  const id = `field-${name}`;
  // Required values are filled in; optional ones only have a placeholder.
  const value = preset ?? (required ? String(example ?? shape.default ?? "") : "");
  const control = make(shape, value, required);
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-help ${id}-fault`);
  if (required) control.required = true;
  if (!shape.enum && shape.type !== "boolean") control.placeholder = suggestion(shape, example);
  const label = element("label", { htmlFor: id }, element("code", {}, name), required ? " (required)" : "");
  const help = element("small", { id: `${id}-help` }, ...prose([description, hint(shape)].filter(Boolean).join(" ")));
  return {
    parameter,
    control,
    read: () => read(control, shape),
    node: element("div", { className: "field" }, label, control, help, fault(id)),
  };
}

function make(shape, value, required) {
  if (shape.enum)
    return select(shape.enum, value, required ? null : shape.default == null ? "any" : `${shape.default} (default)`);
  if (shape.type === "boolean" && typeof shape.default === "boolean")
    return select([String(!shape.default)], value, `${shape.default} (default)`);
  if (shape.type === "boolean") return select(["true", "false"], value, required ? null : "any");
  if (shape.type === "array") return element("textarea", { rows: 1, value, spellcheck: false });
  const numeric = shape.type === "integer" || shape.type === "number";
  const control = element("input", { type: "text", value, spellcheck: false });
  if (numeric) control.inputMode = shape.type === "integer" ? "numeric" : "decimal";
  return control;
}

function select(values, value, none) {
  const options = values.map((one) => element("option", { value: one }, String(one)));
  if (none !== null) options.unshift(element("option", { value: "" }, none));
  const control = element("select", {}, ...options);
  if (value) control.value = value;
  return control;
}

function choice(name, description, values, value, optional = true) {
  const id = `choice-${name}`;
  const control = select(values, value, optional ? "*/*" : null);
  control.id = id;
  const label = element("label", { htmlFor: id }, element("code", {}, name));
  return { control, node: element("div", { className: "field" }, label, control, element("small", {}, description)) };
}

function read(control, shape) {
  if (shape.type === "array")
    return control.value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
  return control.value === "" ? [] : [control.value];
}

function suggestion(shape, example) {
  if (example !== undefined) return `e.g. ${example}`;
  const fallback = shape.default;
  return fallback == null || fallback === "" || Array.isArray(fallback) ? "" : `${fallback}`;
}

/** Describe the type and the bounds of a parameter. */
function hint(shape) {
  if (shape.enum || shape.type === "boolean") return "";
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
