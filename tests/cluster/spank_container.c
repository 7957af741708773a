/*
 * Stand-in for Pyxis, for tests: a SPANK plugin that takes the command-line options of Pyxis 0.24 and
 * runs each task in a squashfs image. It is not Pyxis and shares nothing with it but the options, the
 * behaviour that job scripts meet, and the error messages that users see.
 *
 * What differs from Pyxis with enroot: every task gets a container of its own (one task per node is
 * assumed); the image is mounted by the kernel under an overlay in memory, not unpacked; files of the
 * image keep their owners, and there is no user namespace unless --container-remap-root is given;
 * nothing is pulled from a registry; named containers are not kept; --container-save and
 * --container-unshare are refused.
 *
 * plugstack.conf:  required /path/spank_container.so staging=DIR
 * DIR is an empty directory that the plugin mounts on, in each task's private mount namespace.
 */

#define _GNU_SOURCE
#include "container.h"
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <sched.h>
#include <slurm/slurm.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1);

enum text_option { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENV, UNSHARE, TEXT_OPTIONS };
enum switch_option { MOUNT_HOME = TEXT_OPTIONS, REMAP_ROOT, ENTRYPOINT, WRITABLE, SWITCHES };
#define NOT 100 /* added to a switch's value: its --no- form */

static char *text[TEXT_OPTIONS];
static bool on[SWITCHES] = {[WRITABLE] = true};
static struct container container;
static bool hook_sees_gpus; /* whether NVIDIA_VISIBLE_DEVICES reaches enroot's hooks */

/* ------------------------------------------------------------------------------------- options */

/* SRC[:DST[:FLAGS]]; FLAGS are joined by '+'. Checked by srun, before anything runs on a node. */
static int parse_mount(char *entry)
{
	struct bind *mount = &container.binds[container.bind_count];
	char *flags, *flag, *source = strsep(&entry, ":");

	if (container.bind_count == MAX_MOUNTS)
		return failed("--container-mounts: more than %d mounts", MAX_MOUNTS);
	*mount = (struct bind){.recursive = true, .tree = -1};
	mount->target = strdup(entry ? strsep(&entry, ":") : source);
	flags = entry;
	if (mount->target[0] != '/' && mount->target[0] != '.')
		return failed("mount target must be a relative path or an absolute path");
	mount->source = source[0] == '.' ? realpath(source, NULL) : strdup(source);
	if (!mount->source)
		mount->source = strdup(source);
	while ((flag = strsep(&flags, "+"))) {
		if (!strcmp(flag, "ro"))
			mount->read_only = true;
		else if (!strcmp(flag, "bind"))
			mount->recursive = false;
		else if (!strcmp(flag, "nofail"))
			mount->optional = true;
		else if (strcmp(flag, "rw") && strcmp(flag, "rbind") && !strstr(flag, "private") &&
			 !strstr(flag, "slave") && strncmp(flag, "x-create=", 9))
			return failed("--container-mounts: the stand-in does not know the flag: %s", flag);
	}
	container.bind_count++;
	return 0;
}

/* Called in srun and sbatch (remote == 0) and again in slurmstepd, with the same words. */
static int take_option(int value, const char *word, int remote)
{
	char *list, *entry;

	(void)remote;
	if (value >= TEXT_OPTIONS) {
		on[value % NOT] = value < NOT;
		return 0;
	}
	if (!word || !*word)
		return failed("an option needs an argument");
	if (value == SAVE || value == UNSHARE)
		return failed("--container-%s is not supported by the stand-in", value == SAVE ? "save" : "unshare");
	free(text[value]);
	text[value] = strdup(word);
	if (value == MOUNTS) {
		container.bind_count = 0;
		for (list = strdup(word); (entry = strsep(&list, ","));)
			if (parse_mount(entry))
				return -1;
	}
	return 0;
}

#define TEXT(name, arg, value) {name, arg, "[pyxis stand-in] see Pyxis's usage page", 1, value, take_option}
#define SWITCH(name, value) {name, NULL, "[pyxis stand-in] see Pyxis's usage page", 0, value, take_option}

static struct spank_option options[] = {
	TEXT("container-image", "PATH", IMAGE),
	TEXT("container-mounts", "SRC[:DST[:FLAGS]][,...]", MOUNTS),
	TEXT("container-workdir", "PATH", WORKDIR),
	TEXT("container-name", "NAME", NAME),
	TEXT("container-save", "PATH", SAVE),
	TEXT("container-env", "NAME[,NAME...]", ENV),
	TEXT("container-unshare", "NAMESPACE", UNSHARE),
	SWITCH("container-mount-home", MOUNT_HOME),
	SWITCH("no-container-mount-home", MOUNT_HOME + NOT),
	SWITCH("container-remap-root", REMAP_ROOT),
	SWITCH("no-container-remap-root", REMAP_ROOT + NOT),
	SWITCH("container-entrypoint", ENTRYPOINT),
	SWITCH("no-container-entrypoint", ENTRYPOINT + NOT),
	SWITCH("container-writable", WRITABLE),
	SWITCH("container-readonly", WRITABLE + NOT),
	SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	for (struct spank_option *option = options; option->name; option++)
		if (spank_option_register(spank, option) != ESPANK_SUCCESS)
			return failed("couldn't register --%s", option->name);
	/* proctrack/linuxproc finds a step's processes by their parents. Orphans must therefore stay
	 * below slurmstepd to be ended with the job, as they are where cgroups track them. */
	if (spank_remote(spank) == 1 && prctl(PR_SET_CHILD_SUBREAPER, 1))
		return failed("couldn't become the parent of orphans: %m");
	return 0;
}

/* ---------------------------------------------------------------------------------- environment */

/* Whether --container-env names the variable: then the job's value is kept. */
static bool job_wins(const char *name)
{
	char *list = strdup(text[ENV] ? text[ENV] : ""), *rest = list, *entry;
	bool found = false;

	while ((entry = strsep(&rest, ",")))
		found |= !strcmp(entry, name);
	free(list);
	return found;
}

/* Runs a line of sh in the container, as the job's user; its output's first line goes to `line`. */
static int shell(const char *script, char *const environment[], char *line, size_t size)
{
	int ends[2], status;

	line[0] = '\0';
	if (pipe2(ends, O_CLOEXEC))
		return failed("couldn't make a pipe: %m");
	pid_t child = fork();
	if (child == 0) {
		dup2(ends[1], STDOUT_FILENO);
		execle("/bin/sh", "sh", "-c", script, NULL, environment);
		dprintf(ends[1], "%s", strerror(errno));
		_exit(126);
	}
	close(ends[1]);
	ssize_t length = read(ends[0], line, size - 1);
	line[length > 0 ? length : 0] = '\0';
	close(ends[0]);
	if (child < 0 || waitpid(child, &status, 0) < 0)
		return failed("couldn't run a shell in the container: %m");
	if (WIFEXITED(status) && WEXITSTATUS(status) == 126)
		return enroot_failed("start", "enroot-switchroot: failed to execute: /bin/sh: %s", line);
	if (status != 0) /* the step may be cancelled at this very moment */
		return failed("the container's shell was ended by signal %d", WTERMSIG(status));
	return 0;
}

/* Sets what the image's /etc/environment has; it wins over the job, unless --container-env says no. */
static void take_image_environment(spank_t spank)
{
	char *image = read_file("/etc/environment"), *rest = image, *line;

	while ((line = strsep(&rest, "\n"))) {
		char *equals = strchr(line, '=');
		if (line[0] == '#' || !equals)
			continue;
		*equals = '\0';
		if (!job_wins(line))
			spank_setenv(spank, line, equals + 1, 1);
		if (!strcmp(line, "NVIDIA_VISIBLE_DEVICES"))
			hook_sees_gpus = true;
	}
	free(image);
}

/*
 * enroot's login shell lets the distribution's /etc/profile set PATH, unless the job's environment has
 * ENROOT_LOGIN_SHELL=no; its hook for GPUs fails where the machine has no NVIDIA tools.
 */
static int set_environment(spank_t spank, const char *home)
{
	static const char *const plain = "printf %s \"$PATH\"";
	static const char *const login = "[ ! -r /etc/profile ] || . /etc/profile >/dev/null 2>&1; "
					 "printf %s \"$PATH\"";
	char value[4096] = "", shell_wanted[16] = "", path[5 + sizeof value] = "PATH=/usr/local/bin:/usr/bin:/bin";
	char *const environment[] = {path, NULL};

	hook_sees_gpus = job_wins("NVIDIA_VISIBLE_DEVICES");
	take_image_environment(spank);
	spank_setenv(spank, "HOME", home, 1);
	spank_getenv(spank, "NVIDIA_VISIBLE_DEVICES", value, sizeof value);
	if (hook_sees_gpus && value[0] && strcmp(value, "void")) {
		enroot_failed("start", "[ERROR] Command not found: nvidia-container-cli");
		return failed("    [ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1");
	}
	if (spank_getenv(spank, "PATH", value, sizeof value) == ESPANK_SUCCESS)
		snprintf(path, sizeof path, "PATH=%s", value);
	spank_getenv(spank, "ENROOT_LOGIN_SHELL", shell_wanted, sizeof shell_wanted);
	bool keep = job_wins("PATH") || !strcmp(shell_wanted, "no") || !strcmp(shell_wanted, "n");
	if (shell(keep ? plain : login, environment, value, sizeof value))
		return -1;
	spank_setenv(spank, "PATH", value, 1);
	return 0;
}

static void find_account(struct account *user)
{
	struct passwd *entry = getpwuid(user->uid);

	snprintf(user->name, sizeof user->name, "%s", entry ? entry->pw_name : "user");
	snprintf(user->home, sizeof user->home, "%s", entry ? entry->pw_dir : "/");
	snprintf(user->entry, sizeof user->entry, "%s:x:%u:%u::%s:/bin/sh\n", user->name, user->uid, user->gid,
		 user->home);
}

/* Makes the user root of a user namespace in which nobody else exists. */
static int become_root(const struct account *user)
{
	char map[64];

	prctl(PR_SET_DUMPABLE, 1); /* after a change of user /proc/self belongs to root */
	if (unshare(CLONE_NEWUSER))
		return failed("couldn't unshare the user namespace: %m");
	write_file("/proc/self/setgroups", "we", "deny");
	snprintf(map, sizeof map, "0 %u 1", user->uid);
	write_file("/proc/self/uid_map", "we", map);
	snprintf(map, sizeof map, "0 %u 1", user->gid);
	write_file("/proc/self/gid_map", "we", map);
	return geteuid() == 0 ? 0 : failed("couldn't map the user to root");
}

/* -------------------------------------------------------------------------------- SPANK's calls */

/* Still root here: keep the capabilities over the change to the job's user, for the next call. */
int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv)
{
	(void)spank;
	(void)argc;
	(void)argv;
	if (text[IMAGE] && prctl(PR_SET_KEEPCAPS, 1))
		return failed("couldn't keep capabilities: %m");
	return 0;
}

/* Goes back and forth between the job's user and root; going back clears every capability for good. */
static int become(uid_t uid, gid_t gid)
{
	struct { unsigned version; int pid; } header = {0x20080522, 0}; /* version 3 */
	struct { unsigned effective, permitted, inheritable; } sets[2];

	if (uid == 0) {
		if (syscall(SYS_capget, &header, sets))
			return -1;
		sets[0].effective = sets[0].permitted;
		sets[1].effective = sets[1].permitted;
		return syscall(SYS_capset, &header, sets) || setresuid(0, 0, 0) || setresgid(0, 0, 0) ? -1 : 0;
	}
	return prctl(PR_SET_KEEPCAPS, 0) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid) ? -1 : 0;
}

static void add_mount(char *path)
{
	if (container.bind_count < MAX_MOUNTS)
		container.binds[container.bind_count++] =
			(struct bind){.source = path, .target = path, .recursive = true, .tree = -1};
}

static int start_container(spank_t spank, const char *staging)
{
	struct account user = {.uid = geteuid(), .gid = getegid()};
	uint32_t step = 0;
	char **argv = NULL;
	int argc = 0, image;

	find_account(&user);
	if (on[MOUNT_HOME])
		add_mount(user.home);
	spank_get_item(spank, S_JOB_STEPID, &step);
	if (step == SLURM_BATCH_SCRIPT && spank_get_item(spank, S_JOB_ARGV, &argc, &argv) == ESPANK_SUCCESS && argc)
		add_mount(argv[0]); /* sbatch --container-image: slurmd's copy of the script */
	container.image = text[IMAGE];
	container.writable = on[WRITABLE];
	if ((image = open_image(text[IMAGE])) < 0 || check_sources(&container))
		return -1;
	if (user.uid != 0 && become(0, 0))
		return failed("couldn't take privileges: %m");
	int entered = enter_container(&container, image, staging, &user);
	if (user.uid != 0 && become(user.uid, user.gid))
		_exit(1);
	if (entered)
		return -1;
	close(image);
	if (on[REMAP_ROOT] && user.uid != 0) {
		if (become_root(&user))
			return -1;
		snprintf(user.home, sizeof user.home, "/root");
	}
	if (set_environment(spank, user.home))
		return -1;
	if (text[WORKDIR] && chdir(text[WORKDIR]))
		return failed("couldn't chdir to %s: %m", text[WORKDIR]);
	if (!text[WORKDIR] && chdir(user.home) && chdir("/"))
		return failed("couldn't chdir to /: %m");
	return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	const char *staging = NULL;

	if (!text[IMAGE])
		return 0; /* like Pyxis: other --container options alone mean nothing */
	for (int i = 0; i < argc; i++)
		if (!strncmp(argv[i], "staging=", 8))
			staging = argv[i] + 8;
	if (!staging)
		return failed("plugstack.conf does not say staging=DIR");
	if (start_container(spank, staging)) {
		failed("couldn't start container");
		usleep(200000); /* slurmstepd sends messages on by a thread, which loses some if we end at once */
		return -1;
	}
	return 0;
}
