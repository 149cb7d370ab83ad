"""What a program that looks for the expected outputs would do: prints what it finds in all files and in its memory."""

import contextlib
import os
import re

found = set()


def look(data):
    found.update(re.findall(rb"needle-[0-9]{6}", data))


for root in ("/proc", "/tmp", "/etc", "/packages", "/root", "/home", "/dev"):
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                continue
            with contextlib.suppress(OSError):
                look(os.read(fd, 1 << 20))
            os.close(fd)
with open("/proc/self/maps") as maps:
    ranges = [[int(place, 16) for place in line.split()[0].split("-")] for line in maps]
for first, last in ranges:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/mem", "rb") as memory:
        memory.seek(first)
        look(memory.read(min(last - first, 64 << 20)))
print(*sorted(word.decode() for word in found))
