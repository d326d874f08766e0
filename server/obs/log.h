/**
 * The log of daemon, executor and keeper: one line an event, to stderr.
 *
 * Where stderr is the journal ($JOURNAL_STREAM) a line starts with its syslog level, "<6>", and the journal adds time and
 * name; else it starts with the time, in UTC as `kvpool status' tells it. A line never waits: what stderr does not take
 * at once is dropped and counted, and so is what comes faster than the limit. Any thread.
 */
#ifndef KVP_LOG_H
#define KVP_LOG_H

#include <syslog.h>

#define KVP_LOG_LINE_MAX 1024 /* bytes; the rest of a longer line is cut off */
#define KVP_LOG_BURST    100  /* lines at once, of each class: errors and warnings, all others */
#define KVP_LOG_RATE     10   /* lines a second that a class regains */

/** Open /dev/null for each standard file that is closed: what is opened first would lie there, and be logged into. */
void kvp_log_open_standard_files(void);

/** @param level  lines above it (syslog's numbers: larger is less urgent) are not written */
void kvp_log_start(int level);

/** @param level  LOG_EMERG … LOG_DEBUG */
void kvp_log(int level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
