// The official client of Durable Streams: writes numbers to the stream STREAM_URL, exactly once, closes it, and follows
// it meanwhile by events and by long polls. Prints a line for each follower that has received ten numbers, and for each
// that has received all of them.
import { DurableStream, IdempotentProducer, stream } from "@durable-streams/client"

const url = process.env.STREAM_URL
const count = 200
const backoffOptions = { initialDelay: 20, maxDelay: 200, multiplier: 1.3 }

// A producer reports what it cannot send, and goes on. This sends it again, as its application would.
async function persistent(...request) {
  for (;;) {
    try {
      return await fetch(...request)
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }
}

// An event stream that breaks ends with an error: it is resumed behind the last batch that was received.
async function follow(live) {
  const received = []
  let [offset, closed] = ["-1", false]
  while (!closed) {
    const response = await stream({ url, offset, live, backoffOptions })
    response.subscribeJson(({ items, offset: reached }) => {
      const before = received.length
      received.push(...items)
      offset = reached
      if (before < 10 && received.length >= 10) console.log(JSON.stringify({ live, begun: true }))
    })
    await response.closed.catch(() => {})
    closed = response.streamClosed
  }
  console.log(JSON.stringify({ live, received }))
}

const handle = await DurableStream.create({ url, contentType: "application/json", backoffOptions })
const followers = ["sse", "long-poll"].map(follow)
const failed = []
const producer = new IdempotentProducer(handle, "numbers", {
  lingerMs: 1,
  fetch: persistent,
  onError: (error) => failed.push(`${error}`),
})
for (let number = 0; number < count; number++) {
  producer.append(JSON.stringify(number))
  if (number % 5 === 0) await new Promise((resolve) => setTimeout(resolve, 5))
}
await producer.close()
await Promise.all(followers)
console.log(JSON.stringify({ failed }))
