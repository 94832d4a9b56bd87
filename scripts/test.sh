#!/usr/bin/env bash
# Builds and runs all tests; the last line says how many ran.
#
#     scripts/test.sh                    everything
#     scripts/test.sh topic              the tests whose path contains "topic"
#     scripts/test.sh -E 'test(heavy_)'  any argument of `cargo nextest run`
#
# Installs what is missing first (scripts/setup.sh). Starts what it needs on free ports and in temporary directories,
# and expects nothing to run.
set -euo pipefail
cd "$(dirname "$0")/.."
built=${CARGO_TARGET_DIR:-target}
log=$built/test.log
started=$SECONDS
passed=0 failed=0 skipped=0 status=0

say() { printf 'test: %s\n' "$*"; }

# The tests say themselves what they log and where they listen; a developer's settings and .env are none of theirs.
unset RUST_LOG
while IFS='=' read -r name _; do
    case "$name" in SOAR_* | DATA_DIR) unset "$name" ;; esac
done < <(env)

# Adds one run's figures, read from its log.
count() {
    local pass=$1 fail=$2 skip=$3
    passed=$((passed + ${pass:-0})) failed=$((failed + ${fail:-0})) skipped=$((skipped + ${skip:-0}))
}

figure() { sed -nE "s/.*[^0-9]([0-9]+) $1.*/\1/p" <<<"$2" | head -n 1; }

with_nextest() {
    cargo nextest run --locked --color never "$@" 2>&1 | tee "$log" || status=1
    local summary
    summary=$(grep -E '^ +Summary \[' "$log" | tail -n 1 || true)
    [ -n "$summary" ] || status=1
    # A test that timed out counts as failed.
    local timed_out
    timed_out=$(figure 'timed out' "$summary")
    count "$(figure passed "$summary")" "$(($(figure failed "$summary" | grep . || echo 0) + ${timed_out:-0}))" \
        "$(figure skipped "$summary")"
}

# Without nextest tests share a process, and heavy ones run beside the others: one thread keeps them apart.
with_cargo_test() {
    cargo test --locked --no-fail-fast "$@" -- --test-threads 1 2>&1 | tee "$log" || status=1
    count_libtest
}

with_doctests() {
    cargo test --locked --doc 2>&1 | tee "$log" || status=1
    count_libtest
}

count_libtest() {
    local line
    while read -r line; do
        count "$(figure passed "$line")" "$(figure failed "$line")" "$(figure ignored "$line")"
    done < <(grep '^test result:' "$log" || true)
}

mkdir -p "$built"
scripts/setup.sh || { say "setup is incomplete: tests that need what is missing will fail"; status=1; }
case $built in
    /*) export BACKBONE_TEST_PYTHON=$built/venv/bin/python ;;
    *) export BACKBONE_TEST_PYTHON=$PWD/$built/venv/bin/python ;;
esac

# Tests that do nothing to RabbitMQ itself share one node. The first of them starts it; it is stopped here, by pid.
rabbitmq=$(mktemp -d)
export BACKBONE_TEST_RABBITMQ=$rabbitmq/shared
stop_rabbitmq() {
    local pid
    if [ -e "$BACKBONE_TEST_RABBITMQ/pids" ]; then
        while read -r pid; do
            kill -KILL "$pid" 2>/dev/null || say "process $pid of the shared RabbitMQ had ended already"
        done <"$BACKBONE_TEST_RABBITMQ/pids"
    fi
    rm -rf "$rabbitmq"
}
trap stop_rabbitmq EXIT

if cargo nextest --version >/dev/null 2>&1; then
    say "cargo nextest run $*"
    with_nextest "$@"
    # Nextest runs no documentation tests; a filter is for it alone.
    if [ $# -eq 0 ]; then
        say "cargo test --doc"
        with_doctests
    fi
else
    say "cargo test $* (cargo-nextest would be quicker: cargo install cargo-nextest --locked)"
    with_cargo_test "$@"
fi

[ "$((passed + failed))" -gt 0 ] || { say "no test ran"; status=1; }
[ "$failed" -eq 0 ] || status=1
verdict=ok
[ "$status" -eq 0 ] || verdict=FAILED
say "$verdict: $((passed + failed)) tests ran, $passed passed, $failed failed, $skipped skipped, in $((SECONDS - started)) s"
exit "$status"
