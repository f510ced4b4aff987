// Shows /openapi.json; nothing is loaded from, or sent to, another server.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#documentation", deepLinking: true, validatorUrl: null });
