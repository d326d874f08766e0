/**
 * What surrounds survive_gpu's tests: the run's state, and the processes that a test starts and kills (daemon under
 * kvpool-keeper, workers, MPS). For the parent process, and its main thread.
 *
 * What can't go on ends the test: failed() and skipped() do not return, and no function here needs to be asked whether
 * it did what it says.
 */
#ifndef SURVIVE_HOUSE_H
#define SURVIVE_HOUSE_H

#include "survive_gpu.h"

#include <setjmp.h>
#include <sys/types.h>

struct survive_run {
    const char *test;
    unsigned number, steps, passed, failed, skipped;
    char folder[64], endpoint[96], log[96], uuid[64];
    struct shared *shared;
    int shared_fd;
    pid_t keeper, workers[SLOTS];
    struct kvp_client *client;
    bool mps;
    enum { PASSED, FAILED, LEFT_OUT } result;
    jmp_buf out; /* of the test that runs */
};

extern struct survive_run t;

struct slot *slot_of(unsigned i);

/* ---- saying ------------------------------------------------------------------------------------------------------ */

/* A line about how far the test is. */
void step(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The test is over. */
void failed(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void skipped(const char *why) __attribute__((noreturn));
/* The test fails with kvp_error_text() unless the status is KVP_OK. */
void well(const char *what, enum kvp_status status);

/* ---- time -------------------------------------------------------------------------------------------------------- */

double now_ms(void);
void sleep_us(long us);
/* Sorts the values. */
double median(double *values, unsigned n);

/* ---- processes --------------------------------------------------------------------------------------------------- */

/* Under kvpool-keeper, in t.folder; connects t.client. */
void start_daemon(const char *executor_environment);
/* 0: there is none at the moment. */
pid_t daemon_pid(void);
/* This program again, in a role, in slot i. */
void start_worker(unsigned i, const char *role);
/* A worker must not have ended, nor found something wrong. */
void check_worker(unsigned i);
/* Until *word is not 0. */
void await(unsigned i, atomic_uint *word, const char *what);
int pidfd_of(pid_t pid);
/* Closes the pidfd. */
void await_end(int pidfd);
/* Signals, waits, and sets *pid to 0. */
void end_process(pid_t *pid, int signal_number);
/* Skips the test where there is none. */
void start_mps(void);
/* Ends and removes all that a test started and made. */
void clean_up(void);
/* The last resort, of SIGALRM: nothing is left running but what was just killed. */
void time_is_over(int number);

/* ---- what the daemon says ---------------------------------------------------------------------------------------- */

uint32_t free_pages(const char *pool);
pid_t executor_pid(void);
/* "big" or "small"; the big one smaller where there is not so much memory. */
void make_pool(bool big);
/* The digests of all sealed pages, once they are all taken. @return pages compared */
uint64_t compare_digests(void);

#endif
