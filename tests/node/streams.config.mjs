// How vitest runs the suite: most of its tests wait, each for a stream of its own, so that some run at once. Those of
// streams that live two seconds have half a second for what they do, which may be too short on a busy machine: a test
// fails that does so three times.
export default {
  test: {
    include: ["streams.test.mjs"],
    testTimeout: 30_000,
    maxConcurrency: 10,
    retry: 2,
    sequence: { concurrent: true },
  },
}
