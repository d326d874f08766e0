/**
 * How kvpool reads text: a file without an end, or a line, must not take the machine's memory.
 */
#include "cli.h"

#include <errno.h>
#include <stdlib.h>

#define ROOM_FIRST 4096u

ssize_t cli_getdelim(char **text, size_t *room, int delimiter, FILE *file)
{
    size_t n = 0;
    int c;

    while ((c = getc_unlocked(file)) != EOF) {
        if (n == CLI_READ_MAX) {
            errno = EFBIG;
            return -1;
        }
        if (n + 2 > *room) {
            size_t larger = *room < ROOM_FIRST ? ROOM_FIRST : 2 * *room;
            char *grown = realloc(*text, larger);

            if (grown == NULL)
                return -1;
            *text = grown;
            *room = larger;
        }
        (*text)[n++] = (char)c;
        if (c == delimiter)
            break;
    }
    if (n == 0 || ferror(file))
        return -1;
    (*text)[n] = 0;
    return (ssize_t)n;
}
