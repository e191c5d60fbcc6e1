#!/bin/sh
# Adds one to the number in a file, under a lock that every program of the tenant respects.
#
# usage: lock.sh FILE
#
# LEASEHOLD_URL, LEASEHOLD_KEY and LEASEHOLD_TENANT say where the service is, and as whom to ask it. On a machine that
# reaches the database, `leasehold run --tenant T --name examples/counter -- command` is shorter.

set -eu

file=${1:?usage: lock.sh FILE}
# The name is one part of the path: a slash in it is written as %2F.
url=$LEASEHOLD_URL/v1/tenants/$LEASEHOLD_TENANT/locks/examples%2Fcounter
# Our own id: should an answer get lost, the same request is answered with the same lock.
lock_id=$(cat /proc/sys/kernel/random/uuid 2> /dev/null || uuidgen | tr A-F a-f)
ttl=10

# Prints the status, which is 000 when no answer came in $3 seconds, and the body behind it.
ask() {
    curl --silent --show-error --max-time "$3" --write-out '\n%{http_code}\n' \
        --header "Authorization: Bearer $LEASEHOLD_KEY" --header 'Content-Type: application/json' \
        --data "$2" "$url/$1" | sed '1h; 1d; 2G'
}

extend() {
    ask extend "{\"lock_id\": \"$lock_id\"}" 3
}

# The value of a member of an answer.
member() {
    sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p"
}

tries=0
while :; do
    answer=$(ask acquire "{\"ttl_ms\": ${ttl}000, \"wait_ms\": 30000, \"lock_id\": \"$lock_id\", \"operation\": \"lock.sh\"}" 65)
    case $answer in
        200*) break ;;
        # Somebody else has it still, the service has too much to do, or its answer was lost.
        409*'"lock_held"'* | 503* | 000*) ;;
        *) echo "refused: $answer" >&2; exit 1 ;;
    esac
    tries=$((tries + 1))
    if [ "$tries" -ge 10 ]; then
        echo "still held: $answer" >&2
        exit 75
    fi
    sleep 1
done
token=$(printf '%s\n' "$answer" | member fencing_token)

# The work that the lock is for. Whoever stops it must be able to: it is a process of its own.
work() {
    number=$(cat "$file")
    sleep 0.05 # Work: enough for another to come in between, were it not for the lock.
    echo $((number + 1)) > "$file"
    echo "$((number + 1)) $token"
}

renewal='' job=''
let_go() {
    # shellcheck disable=SC2086 # There may be none yet.
    kill $renewal $job 2> /dev/null || true
    ask release "{\"lock_id\": \"$lock_id\"}" 10 > /dev/null
}
trap let_go EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# It may have been granted at any time since it was asked for. Extended, it is known to last.
until=$(($(date +%s) + ttl))
case $(extend) in
    200*) ;;
    *) echo "the lock was lost before the work began" >&2; exit 75 ;;
esac

# Extends the lock three times in each ttl, as long as this script runs. When that is refused, or there was no answer
# until it was over, the work is stopped: the lock is somebody else's.
while sleep $((ttl / 3)) 2> /dev/null && kill -0 $$ 2> /dev/null; do
    sent=$(date +%s)
    case $(extend) in
        200*) until=$((sent + ttl)); continue ;;
        409*) ;;
        *) [ "$(date +%s)" -ge "$until" ] || continue ;;
    esac
    echo "the lock was lost" >&2
    kill -TERM $$
    break
done > /dev/null &
renewal=$!
work &
job=$!

wait "$job"
