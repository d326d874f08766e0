/* The daemon's end of a chosen kill; see server/core/kill_point.h. Linked into the daemon that tests kill, alone. */
#include "kill_point.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static atomic_uint *word;

__attribute__((constructor)) static void map_word(void)
{
    const char *path = getenv("KVPOOL_KILL_WORD");
    int fd = path != NULL ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *at;

    if (fd < 0)
        return;
    at = mmap(NULL, sizeof(*word), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED)
        word = at;
}

void kvp_kill_point(enum kvp_kill_point point)
{
    if (word == NULL || atomic_load(word) != (unsigned)point)
        return;
    atomic_store(word, 0);
    kill(getpid(), SIGKILL);
}
