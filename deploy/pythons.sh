#!/usr/bin/env bash
# Prints the Pythons on PATH that Signal can use (3.11 to 3.13), newest first, one path per line.
# A command that exists but does not run (a pyenv shim without its version) is passed over.
set -u
for name in python3.13 python3.12 python3.11 python3; do
    type -aP "$name" | while IFS= read -r command; do
        "$command" -c 'import os, sys
if (3, 11) <= sys.version_info[:2] <= (3, 13):
    print(sys.version_info[1], os.path.realpath(sys.executable), sep="\t")' 2>/dev/null </dev/null
    done
done | sort -t $'\t' -k1,1nr -s | cut -f2 | awk '!seen[$0]++'
