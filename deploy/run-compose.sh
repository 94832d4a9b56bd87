#!/usr/bin/env bash
# Starts RabbitMQ and the backbone with Docker Compose, set up by the .env file in the repository's root, and says what
# to do next. Further arguments replace `up --build --detach`:
#
#     deploy/run-compose.sh              build and start
#     deploy/run-compose.sh logs -f      any other command of `docker compose`
#     deploy/run-compose.sh down
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'run-compose: %s\n' "$*"; }
die() { printf 'run-compose: %s\n' "$*" >&2; exit 1; }

compose() {
    local files=(--project-name communications-backbone --project-directory . --env-file .env -f deploy/compose.yaml)
    docker compose "${files[@]}" "$@"
}

command -v docker >/dev/null || die "docker is not installed"
docker compose version >/dev/null 2>&1 || die "the docker compose plugin (v2) is not installed"

if [ ! -e .env ]; then
    say "no .env yet: taking .env.example, whose defaults are for local work"
    (umask 077 && cp .env.example .env && chmod 600 .env)
fi

# The value of a variable: the environment's, else the last in .env.
setting() {
    local name=$1 default=$2 value
    value=${!name-}
    [ -n "$value" ] || value=$(sed -nE "s/^$name=(.*)$/\1/p" .env | tail -n 1 | sed -E "s/^[\"'](.*)[\"']$/\1/")
    printf '%s' "${value:-$default}"
}

if [ -z "$(setting RABBITMQ_DEFAULT_PASS '')" ]; then
    say "making a password for RabbitMQ, kept in .env"
    printf '\nRABBITMQ_DEFAULT_PASS=%s\n' "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >>.env
fi

[ -z "$(setting SOAR_TLS_CERT '')" ] || say "SOAR_TLS_CERT is not used under Compose: put a proxy that terminates TLS in front"

# The container's user must be able to write the directory that is mounted.
data_dir=$(setting DATA_DIR ./data)
mkdir -p "$data_dir"
if [ "$(id -u)" = 0 ]; then
    BACKBONE_UID=$(setting BACKBONE_UID 65532)
    BACKBONE_GID=$(setting BACKBONE_GID 65532)
    chown "$BACKBONE_UID:$BACKBONE_GID" "$data_dir"
else
    BACKBONE_UID=$(setting BACKBONE_UID "$(id -u)")
    BACKBONE_GID=$(setting BACKBONE_GID "$(id -g)")
fi
export BACKBONE_UID BACKBONE_GID

if [ $# -gt 0 ]; then
    compose "$@"
    exit
fi

compose up --build --detach
address=$(setting PUBLISH_ADDRESS 127.0.0.1)
cat <<TEXT

The backbone:   http://$address:3000   (API documentation at /docs)
RabbitMQ:       amqp://$address:5672, management at http://$address:15672
                (clients log in with their id and secret; see docs/contract.md, section 6)
Admin token:    $data_dir/admin-token
Clients:        deploy/run-compose.sh exec backbone /usr/local/bin/backbone client list
Logs:           deploy/run-compose.sh logs --follow
TEXT
