// The reference server of Durable Streams, in memory, on the port that is its argument.
import { DurableStreamTestServer } from "@durable-streams/server";

await new DurableStreamTestServer({ host: "127.0.0.1", port: Number(process.argv[2]) }).start();
