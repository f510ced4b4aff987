// The routes of /openapi.json: operations, the request of a filled form, and its curl command.

/** The address of the server, without a slash at its end: a proxy may serve it below a path. */
const server = new URL(".", location.href).href.slice(0, -1);

/** Load all operations, in the order of the document. */
export async function load() {
  const document = await (await fetch("openapi.json")).json();
  return Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, declared]) => operation(method.toUpperCase(), path, declared, document)),
  );
}

function operation(method, path, declared, document) {
  const media = Object.keys(declared.responses["200"]?.content ?? {});
  const options = declared["x-curl"] ?? ["-N", "{url}"];
  return {
    key: method + path, // the fragment of its address
    method,
    path,
    summary: declared.summary ?? "",
    description: declared.description ?? "",
    parameters: (declared.parameters ?? []).map(parameter),
    body: declared.requestBody ? body(declared.requestBody, document) : null,
    media,
    accept: accepted(options) ?? media.find((one) => one === "text/event-stream") ?? "", // which has special views
    ranges: "206" in declared.responses,
    curlOptions: options,
  };
}

function parameter({ name, in: where, required, description, example, schema }) {
  // An optional parameter is a choice between its shape and null.
  const shape = schema.anyOf
    ? { ...schema, ...schema.anyOf.find((one) => one.type !== "null"), anyOf: undefined }
    : schema;
  return { name, where, required, description: description ?? "", example, shape };
}

function body({ content }, document) {
  const types = Object.keys(content);
  const first = content[types[0]];
  const named = (first.schema?.$ref ?? "").split("/").at(-1);
  const schema = document.components.schemas[named] ?? first.schema ?? {};
  const example = first.example ?? schema.examples?.[0] ?? (first.schema ? {} : "");
  const short = JSON.stringify(example);
  const text = typeof example === "string" ? example : short.length < 80 ? short : JSON.stringify(example, null, 2);
  return { types, example: text, description: schema.description ?? "" };
}

function accepted(options) {
  return options.find((option) => /^Accept: /.test(option))?.slice("Accept: ".length);
}

/** Return the operation that serves a URL, with the entries of its form; null if there is none. */
export function matching(operations, method, url) {
  const { origin, pathname, searchParams } = new URL(url, location.href);
  if (!`${origin}${pathname}`.startsWith(`${server}/`)) return null;
  const path = `${origin}${pathname}`.slice(server.length);
  // A parameter at the end of a path may have slashes; a path that fits without is preferred.
  for (const last of ["([^/]+)", "(.+)"])
    for (const candidate of operations.filter((one) => one.method === method)) {
      const names = [...candidate.path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name);
      const pattern = candidate.path.replace(/[.*+?^$()|[\]\\]/g, "\\$&");
      const parts = pattern.replace(/\{\w+\}$/, last).replace(/\{\w+\}/g, "([^/]+)");
      const found = new RegExp(`^${parts}$`).exec(path);
      if (found) {
        const entries = names.map((name, at) => [name, decodeURIComponent(found[at + 1])]);
        return { operation: candidate, entries: following(candidate, [...entries, ...searchParams]) };
      }
    }
  return null;
}

/** Return the other operations of a path, each with the entries of its form: what they have in common is filled in. */
export function siblings(operations, { path, method }, entries) {
  const names = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name);
  const common = entries.filter(([name]) => names.includes(name));
  return names.length
    ? operations
        .filter((one) => one.path === path && one.method !== method)
        .map((operation) => ({ operation, entries: following(operation, common) }))
    : [];
}

/** Add to the entries of a form what follows a stream live, as its parameters show by their examples. */
function following({ parameters }, entries) {
  const names = entries.map(([name]) => name);
  if (names.includes("live") || !parameters.some(({ name }) => name === "live")) return entries;
  const shown = parameters.filter(({ name, example }) => ["offset", "live"].includes(name) && example !== undefined);
  return [...entries, ...shown.filter(({ name }) => !names.includes(name)).map(({ name, example }) => [name, [example].flat()[0]])];
}

/** Return the operations on an item of the list that a route returns, each with the name of the path parameter. */
export function itemsOf(operations, { path }) {
  return operations.flatMap((operation) => {
    const found = operation.path.startsWith(`${path}/`) && /^\{(\w+)\}$/.exec(operation.path.slice(path.length + 1));
    return found ? [{ operation, name: found[1] }] : [];
  });
}

/** Return the request for the values of a form. */
export function request(operation, { path, query, more, accept, type, body }) {
  let address = operation.path;
  for (const [name, value] of Object.entries(path))
    address = address.replace(`{${name}}`, encodeURIComponent(value).replaceAll("%2F", "/"));
  const search = [new URLSearchParams(query).toString(), more].filter(Boolean).join("&");
  const headers = {};
  if (accept) headers["Accept"] = accept;
  if (body !== null) headers["Content-Type"] = type;
  return { method: operation.method, url: server + address + (search ? `?${search}` : ""), headers, body };
}

/** Return the curl command of a request, with the options that the author of the route has chosen. */
export function curl(operation, { method, url, headers, body }) {
  const command = ["curl"];
  if (!["GET", "POST"].includes(method)) command.push("-X", method);
  else if (method === "POST" && body === null) command.push("-X", "POST");
  const options = operation.curlOptions.filter((option) => option !== "{url}");
  for (let at = 0; at < options.length; at++) {
    const takesBody = ["--json", "-d", "--data"].includes(options[at]);
    const namesHeader = options[at] === "-H" && /^(Accept|Content-Type): /.test(options[at + 1] ?? "");
    if (takesBody || namesHeader)
      at++; // added below from the form
    else command.push(options[at]);
  }
  for (const [name, value] of Object.entries(headers)) command.push("-H", `${name}: ${value}`);
  if (body !== null) command.push("-d", body);
  return [...command, url].map(quoted).join(" ");
}

function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
