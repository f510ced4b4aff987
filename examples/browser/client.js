// Three methods to consume a stream in a browser: EventSource, fetch, and both for a task. See page.html.

const show = (id, text) => { document.getElementById(id).textContent = text; };

// Follow an endless event stream. EventSource reconnects by itself, with the last id, when a connection breaks; but any status
// other than 200 closes it for good, and a proxy returns 502 while its server restarts. Then another one is created, with
// the id in the URL, since a script cannot set the header. Returns a function that closes it.
function follow(url, listeners, onState) {
    let source, last = "", timer;
    const open = () => {
        const address = new URL(url, location);
        if (last) address.searchParams.set("last_event_id", last);
        source = new EventSource(address);
        source.onopen = () => onState("open");
        source.onerror = () => {
            onState("reconnecting");
            if (source.readyState === EventSource.CLOSED) timer = setTimeout(open, 1000 + 2000 * Math.random());
        };
        for (const [name, listener] of Object.entries(listeners))
            source.addEventListener(name, event => {
                last = event.lastEventId;
                listener(JSON.parse(event.data));
            });
    };
    open();
    return () => { clearTimeout(timer); source.close(); };
}

// Stream the words of a model. The decoder buffers incomplete characters. When the connection is cut, read() rejects, so
// that an incomplete response is detected; abort(), or leaving the page, stops the generation.
async function* words(prompt, signal) {
    const query = new URLSearchParams({ prompt, max_tokens: 40 });
    const response = await fetch(`/ai/chat-stream?${query}`, { signal });
    if (!response.ok) throw new Error((await response.json()).detail);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part; !(part = await reader.read()).done;) yield part.value;
}

// Run a task: start it by POST, follow its URL. Its stream ends, and the EventSource must be closed: it would reconnect.
async function run(kind, parameters, onProgress) {
    const response = await fetch("/process/tasks", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ kind, parameters }),
    });
    const task = await response.json();
    if (!response.ok) throw new Error(task.detail);
    return new Promise(resolve => {
        const stop = follow(task.url, {
            progress: onProgress,
            end: result => { stop(); resolve(result); },
        }, () => {});
    });
}

const prices = document.getElementById("prices");
follow("/stream/stock-ticker", {
    message: price => {
        const line = document.createElement("li");
        line.textContent = `${price.symbol} ${price.price}`;
        prices.prepend(line);
        if (prices.children.length > 1000) prices.lastChild.remove();
    },
    gap: ({ missing }) => show("state", `${missing ?? "some"} events are no longer retained`),
}, state => show("state", state));

let chat = new AbortController();
document.getElementById("chat").addEventListener("submit", async event => {
    event.preventDefault();
    chat.abort();
    chat = new AbortController();
    let text = "";
    try {
        for await (const word of words(event.target.prompt.value, chat.signal)) show("response", text += word);
    } catch (error) {
        if (error.name !== "AbortError") show("response", `${text} [${error.message}]`);
    }
});

document.getElementById("start").addEventListener("click", async () => {
    const bar = document.getElementById("bar");
    const task = await run("rehearsal", { steps: 20, delay: 0.1 }, ({ done, total }) => {
        bar.max = total ?? 1;
        bar.value = done;
    });
    show("result", JSON.stringify(task.result ?? task.error));
});
