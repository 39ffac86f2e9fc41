#!/usr/bin/env bash
# Fail if the subject in a file with a commit message has more than 72 characters. A hook of git for commit-msg.
#
#   scripts/check_commit_subject.sh FILE
set -euo pipefail

IFS= read -r subject <"$1" || true
if [ "${#subject}" -gt 72 ]; then
    printf 'The commit subject has %d characters; the limit is 72:\n%s\n' "${#subject}" "$subject" >&2
    exit 1
fi
