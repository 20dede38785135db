/*
 * The probed program: maps files of code at fixed addresses and calls functions in them as it is told, one
 * command a line, over a socket. Children that it forks serve sockets of their own.
 *
 *     m SLOT PAGES PROT FLAGS FILE PGOFF     mmap (FILE -1: anonymous)       errno
 *     u SLOT PAGES                           munmap                          errno
 *     p SLOT PAGES PROT                      mprotect                        errno
 *     w OFFSET VALUE                         store a short                   0 or signal
 *     c CALLS                                run calls                       0 or signal
 *     t N CALLS                              run calls in N threads          0 or signal
 *     f INDEX                                fork; the child serves a socket its pid
 *     o PATH NAME                            dlopen and dlsym                the address
 *     d                                      dlclose                         0
 *     i ADDRESS                              call int (*)(int) there         what it returned, or -signal
 *     x                                      exit
 *
 * CALLS is the program of the calls: lower case letter and slot: call that function; upper case: tail call;
 * '.': return; '!': longjmp to the innermost function l.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define ARENA 0x2000000000UL

struct act {
	void *function;
	long tail;
};

struct mark {
	unsigned long sp;
	void *ip;
};

static __thread const char *pc;
static __thread struct mark marks[256];
static __thread int nmarks;
static __thread sigjmp_buf home;
static __thread volatile int at_home;

static void *target_of(char function, char slot)
{
	return (void *)(ARENA + (slot - '0') * PAGE + (function - 'a') * 64);
}

/* Called by function l: a longjmp will go on behind that call. */
static void mark(unsigned long sp)
{
	if (nmarks < 256)
		marks[nmarks++] = (struct mark){ sp, __builtin_return_address(0) };
}

/* Called by every function: what to do next. */
static struct act next(unsigned long sp)
{
	struct act act = { 0, 0 };

	while (*pc == '!') {
		pc++;
		if (nmarks) {
			struct mark *to = &marks[nmarks - 1];

			asm volatile("mov %0, %%rsp\n\tjmp *%1" : : "r"(to->sp), "r"(to->ip) : "memory");
		}
	}
	char c = *pc;
	if (c)
		pc++;
	if (c >= 'a' && c <= 'z') {
		act.function = target_of(c, *pc++);
		return act;
	}
	if (nmarks && marks[nmarks - 1].sp == sp)
		nmarks--;
	if (c >= 'A' && c <= 'Z') {
		act.function = target_of(c - 'A' + 'a', *pc++);
		act.tail = 1;
	}
	return act;
}

static void invoke(void *function)
{
	register void *r14 asm("r14") = mark;
	register void *r15 asm("r15") = next;

	/* 256: what is below rsp is the compiler's (the red zone). rbx keeps rsp. */
	asm volatile("mov %%rsp, %%rbx\n\tsub $256, %%rsp\n\tand $-16, %%rsp\n\tcall *%0\n\tmov %%rbx, %%rsp"
		     : "+r"(function), "+r"(r14), "+r"(r15)
		     :
		     : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "memory",
		       "cc");
}

static void on_signal(int signal)
{
	if (!at_home)
		_exit(signal);
	siglongjmp(home, signal);
}

/* Run one program of calls: 0, or the signal that ended it. */
static __attribute__((noinline)) int run(const char *calls)
{
	int signal = sigsetjmp(home, 1);

	if (signal) {
		at_home = 0;
		return signal;
	}
	at_home = 1;
	pc = calls;
	nmarks = 0;
	while (*pc) {
		char c = *pc++;

		if (c >= 'a' && c <= 'z') {
			void *function = target_of(c, *pc++);

			invoke(function);
		}
	}
	at_home = 0;
	return 0;
}

static void *thread(void *calls)
{
	return (void *)(long)run(calls);
}

static int run_threads(int n, char *calls)
{
	pthread_t threads[16];
	int result = 0;

	for (int i = 0; i < n && i < 16; i++)
		pthread_create(&threads[i], 0, thread, calls);
	for (int i = 0; i < n && i < 16; i++) {
		void *ended;

		pthread_join(threads[i], &ended);
		result |= (int)(long)ended;
	}
	return result;
}

static int store(unsigned long address, short value)
{
	int signal = sigsetjmp(home, 1);

	at_home = !signal;
	if (!signal)
		*(volatile short *)address = value;
	at_home = 0;
	return signal;
}

static int call_int(unsigned long address)
{
	int signal = sigsetjmp(home, 1);
	int result = -signal;

	at_home = !signal;
	if (!signal)
		result = ((int (*)(int))address)(20);
	at_home = 0;
	return result;
}

static int serve(int argc, char **argv, int base, int index)
{
	static char line[1 << 16];
	static void *library;

	for (;;) {
		FILE *stream = fdopen(dup(base + index), "r");

		while (fgets(line, sizeof(line), stream)) {
			long a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, result = 0;
			char *rest = strchr(line, '\n');

			if (rest)
				*rest = 0;
			rest = line + (line[1] ? 2 : 1);
			switch (line[0]) {
			case 'm':
				sscanf(rest, "%ld %ld %ld %ld %ld %ld", &a, &b, &c, &d, &e, &f);
				if (mmap((void *)(ARENA + a * PAGE), b * PAGE, c, d, e, f * PAGE) == MAP_FAILED)
					result = errno;
				break;
			case 'u':
				sscanf(rest, "%ld %ld", &a, &b);
				result = munmap((void *)(ARENA + a * PAGE), b * PAGE) ? errno : 0;
				break;
			case 'p':
				sscanf(rest, "%ld %ld %ld", &a, &b, &c);
				result = mprotect((void *)(ARENA + a * PAGE), b * PAGE, c) ? errno : 0;
				break;
			case 'w':
				sscanf(rest, "%ld %ld", &a, &b);
				result = store(ARENA + a, b);
				break;
			case 'c':
				result = run(rest);
				break;
			case 't':
				a = strtol(rest, &rest, 10);
				result = run_threads(a, rest + 1);
				break;
			case 'f':
				sscanf(rest, "%ld", &a);
				result = fork();
				if (!result) {
					fclose(stream);
					index = a;
					goto child;
				}
				break;
			case 'o': {
				char *name = strchr(rest, ' ');

				*name++ = 0;
				library = dlopen(rest, RTLD_NOW | RTLD_LOCAL);
				result = library ? (long)dlsym(library, name) : 0;
				break;
			}
			case 'd':
				result = dlclose(library);
				break;
			case 'i':
				sscanf(rest, "%ld", &a);
				result = call_int(a);
				break;
			case 'x':
				_exit(0);
			}
			dprintf(base + index, "%ld\n", result);
		}
		return 0;
child:;
	}
}

int main(int argc, char **argv)
{
	static const int caught[] = { SIGSEGV, SIGBUS, SIGTRAP, SIGILL, SIGFPE };
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_NODEFER };

	for (unsigned int i = 0; i < sizeof(caught) / sizeof(caught[0]); i++)
		sigaction(caught[i], &action, 0);
	signal(SIGCHLD, SIG_IGN);
	return serve(argc, argv, atoi(argv[1]), 0);
}
