/**
 * What fork() does to clients: nothing may be left of them in the child but memory.
 *
 * A session belongs to the process that connected. A child that held the socket open would keep the daemon from seeing
 * its parent's end-of-file, and calls from it would mix with the parent's on one connection. So the child closes the
 * sockets, and moves the generation, by which every function of the library tells that the client is not its own.
 *
 * The list is guarded by a lock of its own, held over fork() by the handlers, so that the child finds it whole.
 */
#include "internal.h"

#include <unistd.h>

unsigned kvp_fork_generation = 1;

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct kvp_client *clients;

static void before_fork(void)
{
    pthread_mutex_lock(&list_lock);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&list_lock);
}

static void in_child(void)
{
    kvp_fork_generation++;
    for (struct kvp_client *client = clients; client != NULL; client = client->next) {
        if (client->socket >= 0)
            close(client->socket);
        client->socket = -1;
    }
    clients = NULL;
    pthread_mutex_unlock(&list_lock);
}

static void install(void)
{
    pthread_atfork(before_fork, in_parent, in_child);
}

void kvp_fork_watch(struct kvp_client *client)
{
    pthread_once(&once, install);
    pthread_mutex_lock(&list_lock);
    client->fork_generation = kvp_fork_generation;
    client->next = clients;
    clients = client;
    pthread_mutex_unlock(&list_lock);
}

void kvp_fork_unwatch(struct kvp_client *client)
{
    pthread_mutex_lock(&list_lock);
    for (struct kvp_client **at = &clients; *at != NULL; at = &(*at)->next) {
        if (*at == client) {
            *at = client->next;
            break;
        }
    }
    pthread_mutex_unlock(&list_lock);
}
