/**
 * `kvpool replay --plot`: hit rate over capacity, drawn by gnuplot, which reads its script and data from a pipe.
 */
#include "replay.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static const char *terminal_of(const char *file)
{
    const char *dot = strrchr(file, '.');

    if (dot != NULL && strcmp(dot, ".png") == 0)
        return "pngcairo size 1000,640 font 'sans,11'";
    if (dot != NULL && strcmp(dot, ".svg") == 0)
        return "svg size 1000,640 font 'sans,14' background 'white'";
    return NULL;
}

/* Run gnuplot. @param script  NULL: ask for its version only. @return an errno, or EIO where it failed by itself */
static int run_gnuplot(void (*script)(FILE *to, const void *arg), const void *arg)
{
    char *const plot[] = {(char *)"gnuplot", NULL}, *const version[] = {(char *)"gnuplot", (char *)"--version", NULL};
    posix_spawn_file_actions_t actions;
    int pipe_fds[2], status = 0, error;
    pid_t pid;
    FILE *to;

    if (pipe2(pipe_fds, O_CLOEXEC) != 0)
        return errno;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipe_fds[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
    if (script == NULL)
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    error = posix_spawnp(&pid, "gnuplot", &actions, NULL, script != NULL ? plot : version, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(pipe_fds[0]);
    if (error != 0) {
        close(pipe_fds[1]);
        return error;
    }
    to = fdopen(pipe_fds[1], "w");
    if (to == NULL) {
        error = errno;
        close(pipe_fds[1]);
    } else {
        if (script != NULL)
            script(to, arg);
        fclose(to);
    }
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return error != 0 ? error : WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : EIO;
}

bool replay_plot_check(const char *file)
{
    int error;

    if (terminal_of(file) == NULL) {
        fprintf(stderr, "kvpool: replay: --plot: `%s' is neither .png nor .svg\n", file);
        return false;
    }
    error = run_gnuplot(NULL, NULL);
    if (error == 0)
        return true;
    if (error == ENOENT)
        fputs("kvpool: replay: --plot needs gnuplot, which is not installed (Debian: the package gnuplot-nox)\n",
              stderr);
    else
        fprintf(stderr, "kvpool: replay: --plot: gnuplot does not run: %s\n", strerror(error));
    return false;
}

struct plot {
    const char *file, *title;
    double infinite;
    const struct replay_point *points;
    unsigned n;
};

/* In gnuplot's single quotes a quote is written twice. */
static void put_quoted(FILE *to, const char *text)
{
    fputc('\'', to);
    for (; *text != 0; text++) {
        if (*text == '\'')
            fputc('\'', to);
        fputc(*text, to);
    }
    fputc('\'', to);
}

static void put_script(FILE *to, const void *arg)
{
    const struct plot *plot = arg;

    fprintf(to, "set terminal %s\nset output ", terminal_of(plot->file));
    put_quoted(to, plot->file);
    fputs("\nset title ", to);
    put_quoted(to, plot->title);
    fputs(" noenhanced\nset xlabel 'blocks of capacity'\nset ylabel 'hit rate of blocks'\nset logscale x\n"
          "set yrange [0:1]\nset grid\nset key bottom right\nset format x '%.0f'\n$rates << END\n",
          to);
    for (unsigned i = 0; i < plot->n; i++)
        fprintf(to, "%u %.6f %.6f %.6f\n", plot->points[i].pages, plot->points[i].lru, plot->points[i].adaptive,
                plot->points[i].bound);
    fprintf(to,
            "END\n"
            "plot %.6f with lines dashtype 2 linewidth 2 linecolor 'gray40' title 'infinite cache', \\\n"
            " $rates using 1:4 with linespoints linewidth 2 title 'offline optimum', \\\n"
            " $rates using 1:2 with linespoints linewidth 4 title 'lru', \\\n"
            " $rates using 1:3 with linespoints linewidth 2 title 'adaptive'\n",
            plot->infinite);
}

bool replay_plot(const char *file, const char *title, double infinite, const struct replay_point *points, unsigned n)
{
    const struct plot plot = {file, title, infinite, points, n};
    struct sigaction ignore = {.sa_handler = SIG_IGN}, before;
    int error;

    sigaction(SIGPIPE, &ignore, &before); /* a gnuplot that ends early is told by its exit status */
    error = run_gnuplot(put_script, &plot);
    sigaction(SIGPIPE, &before, NULL);
    if (error != 0)
        fprintf(stderr, "kvpool: replay: --plot: gnuplot did not draw %s: %s\n", file, strerror(error));
    return error == 0;
}
