#!/bin/sh
# An arm64 Debian userland with Python, run by qemu-user through binfmt_misc: userland.sh FOLDER SUITE. Takes two to three minutes, once.
set -eu
folder=$1 suite=$2
[ -e "$folder/.ready" ] && exit 0
fail() { echo "$0: $1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "debootstrap and chroot need root"
for program in debootstrap qemu-aarch64-static update-binfmts; do
  command -v "$program" >/dev/null || fail "$program is missing; run: apt-get install debootstrap qemu-user-static binfmt-support"
done
if [ "$(uname -m)" != aarch64 ]; then
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  update-binfmts --enable qemu-aarch64
fi
rm -rf "$folder" && mkdir -p "$folder"
debootstrap --arch=arm64 --variant=minbase --include=python3 --foreign "$suite" "$folder"
chroot "$folder" /debootstrap/debootstrap --second-stage
touch "$folder/.ready"
