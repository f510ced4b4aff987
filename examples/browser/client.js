// Three ways to consume a stream in a browser: EventSource, fetch, and both for a task. See page.html.

const show = (id, text) => { document.getElementById(id).textContent = text; };

// Follow events for good. EventSource comes back by itself, with the last id, when a connection breaks; but any status
// other than 200 ends it for ever, and a proxy says 502 while its server starts again. Then it is begun anew, with the
// id in the address, since a script cannot set the header. Returns a function that ends it.
function follow(url, listeners, onState) {
    let source, last = "", timer;
    const open = () => {
        const address = new URL(url, location);
        if (last) address.searchParams.set("last_event_id", last);
        source = new EventSource(address);
        source.onopen = () => onState("open");
        source.onerror = () => {
            onState("coming back");
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

// Words as they are made. The decoder keeps the first half of a character until the second has come. A connection that
// is cut makes read() reject, so that a part is not taken for the whole; abort(), or leaving the page, stops the work.
async function* words(prompt, signal) {
    const query = new URLSearchParams({ prompt, max_tokens: 40 });
    const response = await fetch(`/ai/chat-stream?${query}`, { signal });
    if (!response.ok) throw new Error((await response.json()).detail);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part; !(part = await reader.read()).done;) yield part.value;
}

// A task: started by POST, followed at its Location. Its stream ends, and so must the EventSource: it would come back.
async function run(kind, parameters, onProgress) {
    const response = await fetch("/process/tasks", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ kind, parameters }),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail);
    return new Promise(resolve => {
        const stop = follow(answer.url, {
            progress: onProgress,
            end: task => { stop(); resolve(task); },
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
    gap: ({ missing }) => show("state", `${missing ?? "some"} events are not kept any more`),
}, state => show("state", state));

let asking = new AbortController();
document.getElementById("ask").addEventListener("submit", async event => {
    event.preventDefault();
    asking.abort();
    asking = new AbortController();
    let text = "";
    try {
        for await (const word of words(event.target.prompt.value, asking.signal)) show("answer", text += word);
    } catch (error) {
        if (error.name !== "AbortError") show("answer", `${text} [${error.message}]`);
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
