/* Ends the process, or fills the disk, at the n-th system call that writes below a folder.
 *
 * Built and preloaded by kills.py. `arm` is called in the process that is to fail; until then all calls pass through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL, FULL };
enum verdict { PASS, FAIL, HALF };

static char prefix[PATH_MAX];
static long at, *seen; /* `seen` lies in memory shared with the parent */
static enum mode mode;
static int armed;

void arm(const char *folder, long number, int what, long *counter) {
    strncpy(prefix, folder, sizeof prefix - 1);
    at = number, mode = what, seen = counter, armed = 1;
}

static int below(const char *path) { return armed && path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* What becomes of the call that has just arrived. A kill leaves half of what was to be written, as a power cut may. */
static enum verdict judge(void) {
    long number = __sync_add_and_fetch(seen, 1);
    if (mode == KILL && number == at) return HALF;
    if (mode == FULL && number >= at) return FAIL;
    return PASS;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define DIE() (raise(SIGKILL), -1)
#define FULL_DISK() (errno = ENOSPC, -1)
#define PLAIN(call) switch (judge()) { case HALF: return DIE(); case FAIL: return FULL_DISK(); default: return call; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!below_fd(fd)) return real(fd, data, size);
    switch (judge()) {
    case HALF: real(fd, data, size / 2); return DIE();
    case FAIL: return FULL_DISK();
    default: return real(fd, data, size);
    }
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    if (!below_fd(fd)) return real(fd, data, size, offset);
    PLAIN(real(fd, data, size, offset))
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (!below_fd(fd)) return real(fd, parts, count);
    PLAIN(real(fd, parts, count))
}

int fsync(int fd) {
    REAL(fsync);
    if (!below_fd(fd)) return real(fd);
    PLAIN(real(fd))
}

int ftruncate64(int fd, off64_t length) {
    REAL(ftruncate64);
    if (!below_fd(fd)) return real(fd, length);
    PLAIN(real(fd, length))
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (!below(to)) return real(from, to);
    PLAIN(real(from, to))
}

int mkdir(const char *path, mode_t rights) {
    REAL(mkdir);
    if (!below(path)) return real(path, rights);
    PLAIN(real(path, rights))
}

/* A full disk still removes files; only a kill can fall on these. */
int unlink(const char *path) {
    REAL(unlink);
    if (below(path) && mode != FULL && judge() == HALF) return DIE();
    return real(path);
}

int rmdir(const char *path) {
    REAL(rmdir);
    if (below(path) && mode != FULL && judge() == HALF) return DIE();
    return real(path);
}

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list more;
    va_start(more, flags);
    mode_t rights = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    if (!below(path) || !(flags & O_CREAT)) return real(path, flags, rights);
    PLAIN(real(path, flags, rights))
}
