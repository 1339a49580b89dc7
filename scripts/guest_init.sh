#!/bin/busybox sh
# shellcheck shell=dash
# The first process of a guest that scripts/guest.sh starts. /guest/run is the command; /guest/modules are loaded before it.
/bin/busybox --install -s 2>/dev/null # what was put there before stays
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root

# The root is a tmpfs already (kernel, Documentation/filesystems/ramfs-rootfs-initramfs.rst), so /tmp is a mere folder in it.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts devpts /dev/pts
ip link set lo up

exec 3>/dev/ttyS1 # the command's output: no line of the kernel's gets in between
stty -F /dev/ttyS1 raw 115200
exec >&3 2>&3 </dev/null
dmesg -n 5 # from here on warnings reach the kernel's console, which is shown when the command fails

loaded=true
while read -r module; do
    insmod "$module" || loaded=false
done </guest/modules
if $loaded; then
    sh /guest/run 3>&-
    status=$?
else
    echo "guest: a module could not be loaded"
    status=125
fi

stty -F /dev/ttyS1 raw # returns once the output is out
# Port 0xe9 is QEMU's -debugcon: the status goes there as one byte.
printf %b "\\0$(printf %o "$status")" | dd of=/dev/port bs=1 count=1 seek=233 2>/dev/null
reboot -f # which -no-reboot turns into QEMU's end
