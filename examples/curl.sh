#!/bin/sh
# Every kind of stream with curl: a download that resumes, events, an export, tokens, a task. sh curl.sh [URL]
set -eu
url=${1:-http://127.0.0.1:8000}

# Retry curl while the connection fails: rejected, interrupted, reset, timed out.
retry() {
    until "$@"; do
        case $? in 7 | 18 | 28 | 52 | 55 | 56) sleep 1 ;; *) return 1 ;; esac
    done
}

# A download. -C - requests the missing rest of the file. With If-Range, which curl does not send by itself, the server
# sends a changed file from its beginning, and curl then fails (33) instead of mixing two versions.
etag=$(retry curl -sSfI "$url/download/large-file" | tr -d '\r' | sed -n 's/^[Ee][Tt][Aa][Gg]: //p')
[ -n "$etag" ]
retry curl -sSf -C - -H "If-Range: $etag" -o large-file.bin "$url/download/large-file"
echo "large-file.bin: $(wc -c <large-file.bin | tr -d ' ') bytes"

# Events. -N prints each as it arrives; a request with the last id resumes. An event is complete with its empty line;
# a named one is about the stream.
: >prices.tsv
until count=$(wc -l <prices.tsv) && [ "$count" -ge 20 ]; do
    last=$(tail -n 1 prices.tsv | cut -f 1)
    curl -sSfN ${last:+-H "Last-Event-ID: $last"} "$url/stream/stock-ticker?limit=$((20 - count))" |
        while id=${id-} name=${name-} data=${data-} && IFS= read -r line; do
            case $line in
                "id: "*) id=${line#id: } name='' data='' ;;
                "event: "*) name=${line#event: } ;;
                "data: "*) data=${line#data: } ;;
                "") [ -z "$data" ] || [ -n "$name" ] || printf '%s\t%s\n' "$id" "$data" | tee -a prices.tsv ;;
            esac
        done
    [ "$(wc -l <prices.tsv)" -ge 20 ] || sleep 1
done

# An export. A server that fails cuts the connection (18); with end=true the last line confirms the rows before it.
curl -sSf -o users.jsonl "$url/export/users/jsonl?limit=1000&end=true"
sum=$(sed '$d' users.jsonl | sha256sum | cut -d ' ' -f 1)
tail -n 1 users.jsonl | grep -q "\"rows\":1000,\"sha256\":\"$sum\""
echo "users.jsonl: verified"

# A task: started by POST, followed at its Location to its end.
task=$(curl -sSf -o /dev/null -D - --json '{"kind": "rehearsal", "parameters": {"steps": 5, "delay": 0.1}}' \
    "$url/process/tasks" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
curl -sSfN -H "Accept: text/event-stream" "$url$task" | sed -n 's/^data: //p' | tail -n 1

# Tokens of a language model, as they are generated.
curl -sSfN --get --data-urlencode "prompt=Tell a story" -d max_tokens=40 "$url/ai/chat-stream"
echo
