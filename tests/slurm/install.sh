#!/usr/bin/env bash
# Debian's Slurm with accounting, for the tests in this folder; exits with 1 and says why where it cannot be had.
# Nothing is configured or started: the tests bring their own configuration, sockets and ports.
set -euo pipefail

programs="munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sbatch srun sacct"
packages="slurm-wlm slurmdbd munge mariadb-server"
export DEBIAN_FRONTEND=noninteractive PATH="$PATH:/usr/sbin:/sbin"

missing() {
    for program in $programs; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

refuse() {
    echo "no Slurm for the tests: $1" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || refuse "its packages are installed, and its daemons started, by root only"
[ -n "$(missing)" ] || exit 0
command -v apt-get >/dev/null || refuse "it comes from Debian's packages, and there is no apt-get"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
install="apt-get install -y -qq --no-install-recommends $packages"
timeout "${DMS_LAB_INSTALL_SECONDS:-240}" bash -c "$install || (apt-get update -qq && $install)" >"$log" 2>&1 ||
    refuse "apt-get could not install $packages: $(tail -n 3 "$log" | tr '\n' ' ')"
[ -z "$(missing)" ] || refuse "$packages are installed, but these are not found: $(missing | tr '\n' ' ')"
