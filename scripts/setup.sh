#!/usr/bin/env bash
# Makes this machine able to run the tests: Debian packages, and a Python environment under target/ for the test peers.
# Does nothing, and needs no network, when everything is there. Leaves no service running.
#
# Needed besides a Rust toolchain: a C compiler (SQLite is compiled in), RabbitMQ (private nodes of the tests), Chromium
# with its driver (the console's tests), promtool (metrics and alert rules), Python (AMQP and webhook peers, and scripts/check-deps).
set -euo pipefail
cd "$(dirname "$0")/.."
built=${CARGO_TARGET_DIR:-target}

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# The shell's python may be one of several; the system's has the venv that apt installs.
python() {
    local candidate
    for candidate in /usr/bin/python3 python3; do
        if "$candidate" -c 'import tomllib, venv, ensurepip' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

missing_packages() {
    command -v cc >/dev/null || echo build-essential
    [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || echo rabbitmq-server
    command -v chromium >/dev/null || echo chromium
    command -v chromedriver >/dev/null || echo chromium-driver
    command -v promtool >/dev/null || echo prometheus
    python >/dev/null || echo python3 python3-venv
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
}

rabbitmq_pids() { pgrep -u rabbitmq 2>/dev/null || true; }

# Packages start their services when they are installed, unless /usr/sbin/policy-rc.d says no (Debian policy 9.3.3).
install_packages() {
    [ "$(id -u)" = 0 ] || die "missing: $* - install them, or run this as root"
    command -v apt-get >/dev/null || die "missing: $* - and there is no apt-get"
    say "installing $*"
    local guard=/usr/sbin/policy-rc.d running_before pid
    # One that is there may allow it, and a broker that starts without an init can keep apt waiting for ten minutes.
    if [ -e "$guard" ]; then
        mv "$guard" "$guard.kept"
        trap 'mv -f /usr/sbin/policy-rc.d.kept /usr/sbin/policy-rc.d' EXIT
    else
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    printf '#!/bin/sh\nexit 101\n' >"$guard"
    chmod 755 "$guard"
    running_before=" $(rabbitmq_pids | tr '\n' ' ')"
    export DEBIAN_FRONTEND=noninteractive
    local options=(-q -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3)
    # Old lists may still name what can be fetched, so this alone is no reason to give up.
    apt-get "${options[@]}" update >"$built/setup-apt.log" 2>&1 || say "apt-get update failed; trying with the lists that are there"
    apt-get "${options[@]}" install -y --no-install-recommends "$@" >>"$built/setup-apt.log" 2>&1 || {
        tail -n 20 "$built/setup-apt.log" >&2
        die "apt-get install failed; see $built/setup-apt.log"
    }
    # A node or an epmd that the installation started all the same is stopped; one that ran before is not ours.
    for pid in $(rabbitmq_pids); do
        case "$running_before" in
            *" $pid "*) ;;
            *)
                say "stopping the service's process $pid"
                kill "$pid" 2>/dev/null || say "it had ended already"
                ;;
        esac
    done
}

setup_python() {
    local venv=$built/venv stamp wanted
    stamp=$venv/.requirements
    wanted=$(sha256sum tests/requirements.txt | cut -d' ' -f1)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c ''; then
        return
    fi
    say "Python environment in $venv"
    rm -rf "$venv"
    "$(python)" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r tests/requirements.txt
    "$venv/bin/pip" check --disable-pip-version-check >/dev/null || die "tests/requirements.txt is not complete"
    echo "$wanted" >"$stamp"
}

mkdir -p "$built"
mapfile -t missing < <(missing_packages | tr ' ' '\n')
if [ "${#missing[@]}" -gt 0 ]; then
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages | tr ' ' '\n')
    [ "${#missing[@]}" -eq 0 ] || die "still missing after the installation: ${missing[*]}"
fi
setup_python
say "ready"
