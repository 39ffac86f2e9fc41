// Added to llama.cpp's threads on the CPU by build_llama.sh.
//
// The threads of a computation meet at a barrier after each operation, several hundred times per token. The original
// barrier spins until the last thread arrives. If other programs use the cores, the kernel stops a thread for
// milliseconds, and the others spin meanwhile on cores that it could use. The waits in this file spin briefly, because
// a wait usually takes a few microseconds, and then sleep until the awaited thread wakes them.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <pthread.h>
#endif

// How long a thread spins before it sleeps: longer than most waits at a barrier, and than most machines take to wake a
// thread (3 to 50 us).
enum { erl_barrier_spin_ns = 50 * 1000, erl_work_spin_ns = 100 * 1000, erl_short_spin_ns = 2 * 1000 };
// One of so many waits spins for the whole time, although the last ones were longer.
enum { erl_long_spins = 32 };

// The waits of one thread at one place. If two threads share a core, then no spin succeeds, and each one delays the
// other thread. So after each failure the next spin is half as long, and after a success it has the whole time again.
typedef struct {
    int64_t limit_ns;
    uint32_t n_waits;
} erl_spin_history;

// One wait that spins: the rounds so far, and when it ends.
typedef struct {
    uint32_t rounds;
    int64_t limit_ns;
    int64_t end_ns;
} erl_spin;

static inline erl_spin erl_begin_spin(erl_spin_history *history, int64_t whole_ns) {
    const bool whole = history->n_waits++ % erl_long_spins == 0;
    const erl_spin spin = {0, whole || history->limit_ns > whole_ns ? whole_ns : history->limit_ns, 0};
    return spin;
}

static inline void erl_end_spin(erl_spin_history *history, int64_t whole_ns, bool success) {
    if (success) {
        history->limit_ns = whole_ns;
    } else if (history->limit_ns > erl_short_spin_ns) {
        history->limit_ns /= 2;
    }
}

static inline int64_t erl_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t) now.tv_sec * 1000000000 + now.tv_nsec;
}

// Counts one round. Returns whether to spin further. Most waits end before the clock is read for the first time.
static inline bool erl_spins(erl_spin *spin) {
    if (++spin->rounds % 32 != 0) {
        return true;
    }
    const int64_t now_ns = erl_now_ns();
    if (spin->end_ns == 0) {
        spin->end_ns = now_ns + spin->limit_ns;
    }
    return now_ns < spin->end_ns;
}

#if defined(__linux__)

static inline void erl_futex(atomic_int *word, int operation, int value) {
    syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

// Sleeps while `*word` has this value. May return early.
static inline void erl_sleep(atomic_int *word, int value) { erl_futex(word, FUTEX_WAIT, value); }

// Wakes the threads that sleep on `word`. The caller has changed its value.
static inline void erl_wake(atomic_int *word) { erl_futex(word, FUTEX_WAKE, INT_MAX); }

#else

// One lock for all words: threads sleep only beside other programs, so they rarely compete for it.
static pthread_mutex_t erl_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t erl_changed = PTHREAD_COND_INITIALIZER;

static inline void erl_sleep(atomic_int *word, int value) {
    pthread_mutex_lock(&erl_mutex);
    while (atomic_load(word) == value) {
        pthread_cond_wait(&erl_changed, &erl_mutex);
    }
    pthread_mutex_unlock(&erl_mutex);
}

static inline void erl_wake(atomic_int *word) {
    (void) word;
    pthread_mutex_lock(&erl_mutex);  // a thread that has read the old value now waits for the condition
    pthread_cond_broadcast(&erl_changed);
    pthread_mutex_unlock(&erl_mutex);
}

#endif

// Waits until `*word` differs from `value`. `sleepers` counts the threads that sleep on this word.
static inline void erl_wait_for_change(atomic_int *word, int value, atomic_int *sleepers, void (*relax)(void)) {
    static _Thread_local erl_spin_history history = {erl_barrier_spin_ns, 0};
    erl_spin spin = erl_begin_spin(&history, erl_barrier_spin_ns);
    while (atomic_load_explicit(word, memory_order_acquire) == value) {
        if (erl_spins(&spin)) {
            relax();
            continue;
        }
        // Either the other thread sees this sleeper after it changed the word, or this thread sees the change.
        atomic_fetch_add(sleepers, 1);
        while (atomic_load(word) == value) {
            erl_sleep(word, value);
        }
        atomic_fetch_sub(sleepers, 1);
        erl_end_spin(&history, erl_barrier_spin_ns, false);
        return;
    }
    erl_end_spin(&history, erl_barrier_spin_ns, true);
}

// Wakes the threads in `erl_wait_for_change`. The caller has changed the word, sequentially consistent.
static inline void erl_end_waits(atomic_int *word, atomic_int *sleepers) {
    if (atomic_load(sleepers) > 0) {
        erl_wake(word);
    }
}

// A worker without work. It announces that it will sleep, checks once more for work, and sleeps.
static inline void erl_announce_sleep(atomic_int *asleep) {
    atomic_store(asleep, 1);
    atomic_thread_fence(memory_order_seq_cst);
}

// Wakes one worker if it sleeps. The caller has published its work.
static inline void erl_wake_worker(atomic_int *asleep) {
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load(asleep) != 0 && atomic_exchange(asleep, 0) != 0) {
        erl_wake(asleep);
    }
}
