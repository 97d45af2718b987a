# Runs steps in lanes side by side, and reports each when it has ended. Sourced by scripts/test.
#
# A lane is a function that calls `step` one after the other; lanes run at the same time. Each step
# writes into a log of its own, which is printed when the step has ended, so that lanes do not mix.
# Needs $scratch, a folder for logs.

# A step that cannot run returns this.
skipped_status=77

steps_passed=0 steps_failed=0 steps_skipped=0
tests_passed=0 failures=0 tests_skipped=0
table=""
skips=""

# The events of all lanes, a line each: shorter than a pipe's buffer, so that lines stay whole.
events=$scratch/events
mkfifo "$events" && exec 3<>"$events" || exit 2

# The tests in a log of cargo test or nextest: "passed failed ignored skipped". A test that could not
# run here prints a line `SKIPPED: why` and passes; it is taken from the passed ones.
totals() {
    awk '
        /^ +(TRY|FAIL|SIGNAL|ABORT|TIMEOUT)[^\[]*\[/ || /^failures:$/ { test = 0 }
        /^ +(PASS|SLOW|LEAK)[^\[]*\[/ || /^---- .* stdout ----$/ { test = NR }
        /^successes:$/ { failures = 0 }
        /^failures:$/ { failures = 1 }
        /^ *SKIPPED: / && test && !failures && !seen[test]++ { skipped++ }
        /^test result: / || /Summary \[.* tests? run:/ {
            n = split($0, word, /[ ,;]+/)
            for (i = 2; i <= n; i++) {
                count = word[i - 1] + 0
                if (word[i] == "passed") passed += count
                else if (word[i] ~ /^(failed|timed|exec)$/) failed += count
                else if (word[i] ~ /^(ignored|skipped)$/) ignored += count
            }
        }
        END { print passed - skipped, failed + 0, ignored + 0, skipped + 0 }
    ' "$1"
}

# The log of a step without what passing tests printed, but for why they were skipped.
brief() {
    awk '
        /^ +(TRY|FAIL|SIGNAL|ABORT|TIMEOUT)[^\[]*\[/ { quiet = 0 }
        /^ +(PASS|SLOW|LEAK)[^\[]*\[/ { quiet = 1; print; next }
        /^successes:$/ { quiet = 2 }
        /^(failures:|test result: |     Running |     Summary |   Doc-tests )/ { quiet = 0 }
        !quiet || /SKIPPED/ || (quiet == 1 && NF && !/^  (stdout|stderr) |^    /) { print }
    ' "$1"
}

# Tells the reporter: tell WHAT FIELD...
tell() {
    local IFS=$'\t'
    printf '%s\n' "$*" >&3
}

# step [--tests | --no-skips] NAME COMMAND...: runs a command as a step of this lane. With --tests the
# step must run at least one test, and its tests are counted; with --no-skips, moreover, a test that
# says that it is skipped is a failure.
step() {
    local kind=once
    case $1 in
    --tests | --no-skips)
        kind=${1#--}
        shift
        ;;
    esac
    local name=$1 log status=0 begin=$SECONDS passed=0 failed=0 ignored=0 skipped=0 user system
    shift
    log=$(mktemp "$scratch/log.XXXXXX") || exit 2
    tell started "$name"
    # What a step uses of the processors is told beside its seconds: lanes share them.
    {
        local TIMEFORMAT='%0U %0S'
        time { ("$@") >"$log" 2>&1 || status=$?; }
    } 2>"$log.time"
    read -r user system < <(tail -n 1 "$log.time")
    if [ "$kind" != once ] && [ "$status" -ne $skipped_status ]; then
        read -r passed failed ignored skipped <<<"$(totals "$log")"
        if [ "$status" -eq 0 ] && [ $((passed + skipped)) -eq 0 ]; then
            echo "no test ran" >>"$log"
            status=1
        elif [ "$status" -eq 0 ] && [ "$kind" = no-skips ] && [ "$skipped" -gt 0 ]; then
            echo "$skipped tests were skipped, though all that they need is here" >>"$log"
            status=1
        fi
    fi
    : >"$scratch/done ${name//\//-}"
    tell ended "$name" "$status" $((SECONDS - begin)) $((user + system)) "$passed" "$failed" "$ignored" \
        "$skipped" "$log"
}

# Ends a step that cannot run: skip WHAT WHY.
skip() {
    echo "SKIP: $1 ($2)"
    return $skipped_status
}

# after STEP...: waits until these steps of other lanes have ended, however they ended.
after() {
    local name
    for name in "$@"; do
        until [ -e "$scratch/done ${name//\//-}" ]; do sleep 0.2; done
    done
}

# report NAME STATUS SECONDS CPU PASSED FAILED IGNORED SKIPPED LOG: prints a step that has ended.
report() {
    local name=$1 status=$2 seconds=$3 cpu=$4 passed=$5 failed=$6 ignored=$7 skipped=$8 log=$9
    local result detail="" without
    printf '\n==== %s\n' "$name"
    brief "$log"
    if [ $((passed + failed + ignored + skipped)) -gt 0 ]; then
        without=$((ignored + skipped))
        detail="$passed tests"
        [ "$without" -gt 0 ] && detail="$detail, $without skipped"
        tests_passed=$((tests_passed + passed))
        tests_skipped=$((tests_skipped + without))
    fi
    case $status in
    0)
        result=ok
        steps_passed=$((steps_passed + 1))
        ;;
    "$skipped_status")
        result=SKIP
        steps_skipped=$((steps_skipped + 1))
        skips="$skips$(grep '^SKIP: ' "$log")"$'\n'
        ;;
    *)
        result=FAIL
        steps_failed=$((steps_failed + 1))
        [ "$failed" -gt 0 ] && detail="$detail, $failed failed"
        failures=$((failures + (failed > 0 ? failed : 1)))
        ;;
    esac
    printf -- '---- %s: %s, %d s\n' "$name" "$result" "$seconds"
    table="$table$(printf '%-5s %5ds %5ds  %-40s %s' "$result" "$seconds" "$cpu" "$name" "$detail")"$'\n'
}

lanes=()

# Ends what the lanes still run, compilers and tests included.
stop_lanes() {
    local lane
    for lane in ${lanes[@]+"${lanes[@]}"}; do
        kill -TERM -- "-$lane" 2>/dev/null
    done
}

# A lane by its name, and a word when it is at its end.
run_lane() {
    "$1"
    tell lane "$1"
}

# run_lanes LANE...: runs them side by side and reports their steps until all have ended.
run_lanes() {
    local lane open=$# event fields
    # Each in a process group of its own, so that it can be stopped with all that it started.
    set -m
    for lane in "$@"; do
        run_lane "$lane" &
        lanes+=($!)
    done
    set +m
    while [ "$open" -gt 0 ]; do
        IFS=$'\t' read -r event fields <&3 || break
        case $event in
        started) printf '.... %s\n' "$fields" ;;
        lane) open=$((open - 1)) ;;
        ended)
            IFS=$'\t' read -r -a fields <<<"$fields"
            report "${fields[@]}"
            ;;
        esac
    done
    wait
    lanes=()
}

summary() {
    printf '\n==== summary, %dm %02ds; seconds, and seconds of processor time\n%s' \
        $((SECONDS / 60)) $((SECONDS % 60)) "$table"
    [ -n "$skips" ] && printf '\n%s' "$skips"
    printf '\nsteps: %d passed, %d failed, %d skipped; tests and failures:\n' \
        "$steps_passed" "$steps_failed" "$steps_skipped"
    printf '%d passed, %d failed, %d skipped\n' "$tests_passed" "$failures" $((tests_skipped + steps_skipped))
}
