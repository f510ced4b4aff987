// Shows /openapi.json; nothing is loaded from, or sent to, another server.
const root = document.querySelector("#documentation");

/** Add what screen readers and keyboards need: names, a heading, and a single control in the head of an operation. */
function complete() {
  for (const control of root.querySelectorAll("select:not([aria-label])")) {
    const row = control.closest("[data-param-name]");
    if (row) control.setAttribute("aria-label", row.dataset.paramName);
    else if (!control.labels.length && !control.title) control.setAttribute("aria-label", "Media type");
  }
  // The head is a button that also sets the address; a link in it would be a second stop.
  for (const link of root.querySelectorAll("button a[href]")) link.removeAttribute("href");
  for (const button of root.querySelectorAll(".copy-to-clipboard button:not([aria-label])"))
    button.setAttribute("aria-label", "Copy");
  for (const code of root.querySelectorAll("pre.microlight:not([tabindex])")) code.tabIndex = 0;
  // The title is an h2: each heading is one level higher than its element says.
  for (const heading of root.querySelectorAll(":is(h2, h3, h4, h5, h6):not([aria-level])"))
    heading.setAttribute("aria-level", heading.tagName[1] - 1);
}

const url = "openapi.json";

/** The token that was entered in Authorize. */
let token = "";

/** Load the document again when a token is entered or removed: it has the routes that the token allows. */
function authorization(original, system) {
  return (payload) => {
    original(payload);
    token = system.authSelectors.authorized().getIn(["token", "value"]) ?? "";
    system.specActions.download(url);
  };
}

/** Send the token with the request for the document; that of Try it out has it by itself. */
function requestInterceptor(request) {
  if (request.loadSpec && token) request.headers = { ...request.headers, Authorization: `Bearer ${token}` };
  return request;
}

const wrapActions = { authorize: (...given) => authorization(...given), logout: (...given) => authorization(...given) };

new MutationObserver(complete).observe(root, { childList: true, subtree: true });
SwaggerUIBundle({
  url,
  dom_id: "#documentation",
  deepLinking: true,
  validatorUrl: null,
  requestInterceptor,
  plugins: [() => ({ statePlugins: { auth: { wrapActions } } })],
});
