// The routes of /openapi.json: operations, the request of a filled form, and its curl line.

/** All operations, in the document's order. */
export async function load() {
  const document = await (await fetch("/openapi.json")).json();
  return Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, declared]) => operation(method.toUpperCase(), path, declared, document)),
  );
}

function operation(method, path, declared, document) {
  const media = Object.keys(declared.responses["200"]?.content ?? {});
  const words = declared["x-curl"] ?? ["-N", "{url}"];
  return {
    key: method + path, // what an address names after its "#"
    method,
    path,
    summary: declared.summary ?? "",
    description: declared.description ?? "",
    parameters: (declared.parameters ?? []).map(parameter),
    body: declared.requestBody ? body(declared.requestBody, document) : null,
    media,
    accept: accepted(words) ?? media.find((one) => one === "text/event-stream") ?? "", // the one with views of its own
    ranges: "206" in declared.responses,
    words,
  };
}

function parameter({ name, in: place, required, description, example, schema }) {
  // A parameter that may be left out is a choice between its shape and null.
  const shape = schema.anyOf
    ? { ...schema, ...schema.anyOf.find((one) => one.type !== "null"), anyOf: undefined }
    : schema;
  return { name, place, required, description: description ?? "", example, shape };
}

function body({ content }, document) {
  const types = Object.keys(content);
  const first = content[types[0]];
  const named = (first.schema?.$ref ?? "").split("/").at(-1);
  const schema = document.components.schemas[named] ?? first.schema ?? {};
  const example = first.example ?? schema.examples?.[0] ?? {};
  const short = JSON.stringify(example);
  const text = typeof example === "string" ? example : short.length < 80 ? short : JSON.stringify(example, null, 2);
  return { types, example: text, description: schema.description ?? "" };
}

function accepted(words) {
  return words.find((word) => /^Accept: /.test(word))?.slice("Accept: ".length);
}

/**
 * The route that a newcomer meets first: an event stream that needs nothing, has no end of its own, can be resumed, and
 * asks the least.
 */
export function simplest(operations) {
  const ready = operations.filter(
    ({ method, parameters, media }) =>
      method === "GET" && media.join() === "text/event-stream" && !parameters.some(({ required }) => required),
  );
  const takes = (name) => ({ parameters }) => parameters.some((parameter) => parameter.name === name);
  const resumable = ready.filter(takes("last_event_id")).filter(takes("limit"));
  const fewest = (one, other) => one.parameters.length - other.parameters.length;
  return resumable.sort(fewest)[0] ?? ready.sort(fewest)[0] ?? operations[0];
}

/** The operation that a path of this server is answered by, with the values of its path parameters; or null. */
export function matching(operations, method, path) {
  for (const candidate of operations.filter((one) => one.method === method)) {
    const names = [...candidate.path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name);
    const pattern = candidate.path.replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace(/\{\w+\}/g, "([^/]+)");
    const found = new RegExp(`^${pattern}$`).exec(path);
    if (found)
      return {
        operation: candidate,
        values: Object.fromEntries(names.map((name, at) => [name, decodeURIComponent(found[at + 1])])),
      };
  }
  return null;
}

/** The request that an operation becomes with the values of its form. */
export function request(operation, { path, query, more, accept, type, body }) {
  let address = operation.path;
  for (const [name, value] of Object.entries(path))
    address = address.replace(`{${name}}`, encodeURIComponent(value).replaceAll("%2F", "/"));
  const search = [new URLSearchParams(query).toString(), more].filter(Boolean).join("&");
  const headers = {};
  if (accept) headers["Accept"] = accept;
  if (body !== null) headers["Content-Type"] = type;
  return { method: operation.method, url: location.origin + address + (search ? `?${search}` : ""), headers, body };
}

/** The command that sends a request, with the options that the route's author chose for it. */
export function curl(operation, { method, url, headers, body }) {
  const command = ["curl"];
  if (!["GET", "POST"].includes(method)) command.push("-X", method);
  else if (method === "POST" && body === null) command.push("-X", "POST");
  const options = operation.words.filter((word) => word !== "{url}");
  for (let at = 0; at < options.length; at++) {
    const takesBody = ["--json", "-d", "--data"].includes(options[at]);
    const namesHeader = options[at] === "-H" && /^(Accept|Content-Type): /.test(options[at + 1] ?? "");
    if (takesBody || namesHeader)
      at++; // said below, as the form has it
    else command.push(options[at]);
  }
  for (const [name, value] of Object.entries(headers)) command.push("-H", `${name}: ${value}`);
  if (body !== null) command.push("-d", body);
  return [...command, url].map(quoted).join(" ");
}

function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
