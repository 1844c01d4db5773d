/* Preloaded into processes that a test breaks. Two instruments, both off until they are used:

   The wall clock. CHAOS_CLOCK names a file of eight bytes, a signed number of seconds; every process that
   has it mapped sees the wall clock shifted by them from the moment they are written. Monotonic clocks
   are left alone, as a jump of the real clock leaves them.

   File operations. chaos_arm(n, mode) counts those that change something, from then on; the n-th is
   the fatal one: 1 the process is killed before it, 2 half-way through it (half of a write, else after
   it), 3 it fails for want of space, and so does every later one that needs space. chaos_count() tells how
   many there were. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* --- the clock --------------------------------------------------------------------------------- */

static const volatile int64_t *offset;

__attribute__((constructor)) static void map_the_clock(void) {
  const char *path = getenv("CHAOS_CLOCK");
  if (!path) return;
  int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return;
  void *found = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (found != MAP_FAILED) offset = found;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, now);
  if (!failed && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec += *offset;
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec found;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &found);
  now->tv_sec = found.tv_sec;
  now->tv_usec = found.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *kept) {
  struct timespec found;
  clock_gettime(CLOCK_REALTIME, &found);
  if (kept) *kept = found.tv_sec;
  return found.tv_sec;
}

/* --- file operations --------------------------------------------------------------------------- */

enum { OFF, KILL_BEFORE, KILL_WITHIN, NO_SPACE };

static int mode;
static long fatal, count;

void chaos_arm(long n, int how) {
  fatal = n;
  mode = how;
  count = 0;
}

long chaos_count(void) { return count; }

static void die(void) { kill(getpid(), SIGKILL); }

/* Counts an operation. Whether it is the fatal one, which then is to end half-way. */
static int is_fatal(void) {
  if (mode == OFF) return 0;
  if (++count != fatal) return 0;
  if (mode == KILL_BEFORE) die();
  return mode == KILL_WITHIN;
}

/* Whether there is no space left for the operation that was just counted. */
static int is_full(void) {
  if (mode != NO_SPACE || count < fatal) return 0;
  errno = ENOSPC;
  return 1;
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* An operation that is done whole or not at all. */
#define COUNTED(call) \
  int last = is_fatal(); \
  if (is_full()) return -1; \
  __typeof__(call) found = call; \
  if (last) die(); \
  return found

/* An operation that frees space: it is never refused for want of it. */
#define FREEING(call) \
  int last = is_fatal(); \
  __typeof__(call) found = call; \
  if (last) die(); \
  return found

#define WRITES(flags) ((flags) & (O_CREAT | O_TRUNC))

#define OPENS(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = va_arg(rest, mode_t); \
    va_end(rest); \
    if (!WRITES(flags)) return real(path, flags, bits); \
    COUNTED(real(path, flags, bits)); \
  }

OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = va_arg(rest, mode_t); \
    va_end(rest); \
    if (!WRITES(flags)) return real(folder, path, flags, bits); \
    COUNTED(real(folder, path, flags, bits)); \
  }

OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  if (fd <= 2) return real(fd, data, size);
  int last = is_fatal();
  if (is_full()) {
    /* The first that does not fit is cut short, as a file system does it; the rest is refused. */
    if (count > fatal || size < 2) return -1;
    return real(fd, data, size / 2);
  }
  if (last) {
    real(fd, data, size / 2);
    die();
  }
  return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(writev);
  if (fd <= 2) return real(fd, parts, n);
  COUNTED(real(fd, parts, n));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(pwrite64);
  COUNTED(real(fd, data, size, at));
}

int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  COUNTED(real(fd, size));
}

int fsync(int fd) {
  REAL(fsync);
  COUNTED(real(fd));
}

int fdatasync(int fd) {
  REAL(fdatasync);
  COUNTED(real(fd));
}

int rename(const char *from, const char *to) {
  REAL(rename);
  COUNTED(real(from, to));
}

int renameat(int a, const char *from, int b, const char *to) {
  REAL(renameat);
  COUNTED(real(a, from, b, to));
}

int mkdir(const char *path, mode_t bits) {
  REAL(mkdir);
  COUNTED(real(path, bits));
}

int mkdirat(int folder, const char *path, mode_t bits) {
  REAL(mkdirat);
  COUNTED(real(folder, path, bits));
}

int unlink(const char *path) {
  REAL(unlink);
  FREEING(real(path));
}

int unlinkat(int folder, const char *path, int flags) {
  REAL(unlinkat);
  FREEING(real(folder, path, flags));
}

int rmdir(const char *path) {
  REAL(rmdir);
  FREEING(real(path));
}
