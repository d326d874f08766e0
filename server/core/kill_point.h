/**
 * The moments of a call at which a test can have the daemon killed, in builds with KVPOOL_TEST_HOOKS.
 *
 * $KVPOOL_KILL_WORD names a file with one 32-bit word, which the daemon maps: when it passes the point that the word
 * names, it sets the word to 0 and kills itself with SIGKILL. In other builds kvp_kill_point is nothing.
 */
#ifndef KVP_KILL_POINT_H
#define KVP_KILL_POINT_H

enum kvp_kill_point {
    KVP_KILL_NONE = 0,
    KVP_KILL_AFTER_PEEK = 1,   /* a request was read, nothing done */
    KVP_KILL_AFTER_COMMIT = 2, /* the ledger has it; the table and the reply are still to come */
    KVP_KILL_BEFORE_REPLY = 3, /* all but the answer is done */
    KVP_KILL_AFTER_REPLY = 4,  /* answered; the request still lies on the socket */
};

#ifdef KVPOOL_TEST_HOOKS
void kvp_kill_point(enum kvp_kill_point point);
#else
#define kvp_kill_point(point) ((void)(point))
#endif

#endif
