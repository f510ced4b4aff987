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

new MutationObserver(complete).observe(root, { childList: true, subtree: true });
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#documentation", deepLinking: true, validatorUrl: null });
