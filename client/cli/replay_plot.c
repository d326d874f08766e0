/**
 * `kvpool replay --plot`: hit rate over capacity, drawn by gnuplot, which reads its script and data from a pipe, and
 * writes the picture to another: it knows nothing of the file, whose name it would take for more than that.
 */
#include "replay.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
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

/* ---- the script -------------------------------------------------------------------------------------------------- */

struct plot {
    const char *terminal, *title;
    double infinite;
    const struct replay_point *points; /* the least capacity first */
    unsigned n;
};

/* In gnuplot's single quotes a quote is written twice, and a line's end would end them. */
static void put_quoted(FILE *to, const char *text)
{
    fputc('\'', to);
    for (; *text != 0; text++) {
        if (*text == '\'')
            fputc('\'', to);
        fputc(iscntrl((unsigned char)*text) ? '?' : *text, to);
    }
    fputc('\'', to);
}

/* The capacities lie apart by halves, so that on a logarithmic scale each has room for its number. */
static void put_plot(FILE *to, const struct plot *plot)
{
    fprintf(to, "set terminal %s\nset title ", plot->terminal);
    put_quoted(to, plot->title);
    fputs(" noenhanced\nset xlabel 'blocks of capacity'\nset ylabel 'hit rate of blocks'\nset logscale x\n"
          "set yrange [0:1]\nset grid\nset key bottom right\nset xtics (",
          to);
    for (unsigned i = 0; i < plot->n; i++)
        fprintf(to, "%s%u", i > 0 ? ", " : "", plot->points[i].pages);
    fprintf(to, ")\nset xrange [%.3f:%.3f]\n$rates << END\n", 0.8 * plot->points[0].pages,
            1.25 * plot->points[plot->n - 1].pages);
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

/* ---- gnuplot ----------------------------------------------------------------------------------------------------- */

/* What gnuplot drew. */
struct picture {
    char *bytes; /* NULL: nothing; else to be freed */
    size_t n;
};

/* Start it, between the ends of two pipes. @return an errno */
static int start_gnuplot(bool version, int script_fd, int picture_fd, pid_t *ret_pid)
{
    char *const plot[] = {(char *)"gnuplot", NULL}, *const ask[] = {(char *)"gnuplot", (char *)"--version", NULL};
    posix_spawn_file_actions_t actions;
    int error;

    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, script_fd, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, picture_fd, STDOUT_FILENO);
    error = posix_spawnp(ret_pid, "gnuplot", &actions, NULL, version ? ask : plot, environ);
    posix_spawn_file_actions_destroy(&actions);
    return error;
}

/* Takes the fd. @return an errno; a gnuplot that ends early is told by its exit status */
static int put_script(int fd, const struct plot *plot)
{
    FILE *to = fdopen(fd, "w");
    int error = errno;

    if (to == NULL) {
        close(fd);
        return error;
    }
    if (plot != NULL)
        put_plot(to, plot);
    fclose(to);
    return 0;
}

/* All of it, to the end. @return an errno */
static int take_picture(int fd, struct picture *ret_picture)
{
    FILE *to = open_memstream(&ret_picture->bytes, &ret_picture->n);
    int error = to == NULL ? errno : 0;
    char part[4096];
    ssize_t n;

    while (error == 0 && ((n = read(fd, part, sizeof(part))) > 0 || (n < 0 && errno == EINTR)))
        if (n > 0 && fwrite(part, 1, (size_t)n, to) != (size_t)n)
            error = ENOMEM;
    if (to != NULL && fclose(to) != 0)
        error = ENOMEM;
    return error;
}

/* The script fits a pipe: it is written before what is drawn by it is read.
 * @param plot  NULL: gnuplot is asked for its version
 * @return an errno, or EIO where gnuplot failed by itself */
static int run_gnuplot(const struct plot *plot, struct picture *ret_picture)
{
    int script[2], picture[2], status = 0, error;
    pid_t pid;

    *ret_picture = (struct picture){NULL, 0};
    if (pipe2(script, O_CLOEXEC) != 0)
        return errno;
    if (pipe2(picture, O_CLOEXEC) != 0) {
        error = errno;
        close(script[0]);
        close(script[1]);
        return error;
    }
    error = start_gnuplot(plot == NULL, script[0], picture[1], &pid);
    close(script[0]);
    close(picture[1]);
    if (error != 0) {
        close(script[1]);
        close(picture[0]);
        return error;
    }
    error = put_script(script[1], plot);
    if (error == 0)
        error = take_picture(picture[0], ret_picture);
    close(picture[0]);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return error != 0 ? error : WIFEXITED(status) && WEXITSTATUS(status) == 0 && ret_picture->n > 0 ? 0 : EIO;
}

/* ---- the file ---------------------------------------------------------------------------------------------------- */

/* Leaves a file that is there as it is, and none where there is none. @return an errno */
static int check_writable(const char *file)
{
    int fd = open(file, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);

    if (fd >= 0)
        unlink(file);
    else if (errno == EEXIST)
        fd = open(file, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    close(fd);
    return 0;
}

/* None of it stays where it does not fit. @return an errno */
static int write_picture(const char *file, const struct picture *picture)
{
    FILE *to = fopen(file, "we");
    int error = 0;

    if (to == NULL)
        return errno;
    if (fwrite(picture->bytes, 1, picture->n, to) != picture->n)
        error = errno;
    if (fclose(to) != 0 && error == 0)
        error = errno;
    if (error != 0)
        unlink(file);
    return error;
}

bool replay_plot_check(const char *file)
{
    struct picture version;
    int error;

    if (terminal_of(file) == NULL) {
        fprintf(stderr, "kvpool: replay: --plot: `%s' is neither .png nor .svg\n", file);
        return false;
    }
    error = run_gnuplot(NULL, &version);
    free(version.bytes);
    if (error == ENOENT)
        fputs("kvpool: replay: --plot needs gnuplot, which is not installed (Debian: the package gnuplot-nox)\n",
              stderr);
    else if (error != 0)
        fprintf(stderr, "kvpool: replay: --plot: gnuplot does not run: %s\n", strerror(error));
    if (error != 0)
        return false;
    error = check_writable(file);
    if (error != 0)
        fprintf(stderr, "kvpool: replay: --plot: %s can not be written: %s\n", file, strerror(error));
    return error == 0;
}

bool replay_plot(const char *file, const char *title, double infinite, const struct replay_point *points, unsigned n)
{
    const struct plot plot = {terminal_of(file), title, infinite, points, n};
    struct sigaction ignore = {.sa_handler = SIG_IGN}, before;
    struct picture picture;
    int error;

    sigaction(SIGPIPE, &ignore, &before);
    error = run_gnuplot(&plot, &picture);
    sigaction(SIGPIPE, &before, NULL);
    if (error != 0) {
        fprintf(stderr, "kvpool: replay: --plot: gnuplot did not draw %s: %s\n", file, strerror(error));
    } else {
        error = write_picture(file, &picture);
        if (error != 0)
            fprintf(stderr, "kvpool: replay: --plot: %s can not be written: %s\n", file, strerror(error));
    }
    free(picture.bytes);
    return error == 0;
}
