// The link of a filled form: the route and what was entered, in the fragment of the page's address.

/** Maximum length of a link, in characters: a longer one goes without the body of the request. */
const MAX_LENGTH = 8000;

/** Return the fragment for an operation and the entries of its form: pairs of a name and a value. */
export function linkTo({ key }, entries) {
  const link = (entries) => `#${key}${entries.length ? `?${new URLSearchParams(entries)}` : ""}`;
  const complete = link(entries);
  return complete.length <= MAX_LENGTH ? complete : link(entries.filter(([name]) => name !== "@body"));
}

/** Return the operation that a fragment names, and the entries of its form; null if it names none. */
export function followed(operations, fragment) {
  const [name, ...rest] = fragment.slice(1).split("?");
  const operation = operations.find(({ key }) => [key, encodeURI(key)].includes(name));
  return operation ? { operation, entries: [...new URLSearchParams(rest.join("?"))] } : null;
}
