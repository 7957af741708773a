/*
 * Stand-in for Pyxis, for tests: a SPANK plugin that takes the command-line options of Pyxis 0.24 and
 * runs each task in a squashfs image. It is not Pyxis and shares nothing with it but the options, the
 * behaviour that job scripts meet, and the error messages that users see.
 *
 * What differs from Pyxis with enroot: every task gets a container of its own (one task per node is
 * assumed); the image is mounted by the kernel under an overlay in memory, not unpacked; there is no
 * user namespace unless --container-remap-root is given; nothing is pulled from a registry; named
 * containers are not kept; --container-save and --container-unshare are refused.
 *
 * plugstack.conf:  required /path/spank_container.so staging=DIR
 * DIR is an empty directory that the plugin mounts on, in each task's private mount namespace.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/loop.h>
#include <pwd.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1);

#define MAX_MOUNTS 64

enum option { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENV, UNSHARE, TEXT_OPTIONS, /* then the switches: */
              MOUNT_HOME, REMAP_ROOT, ENTRYPOINT, WRITABLE, SWITCHES };
#define NOT 100 /* added to a switch's value: its --no- form */

struct bind {
	char *source, *target;
	bool read_only, recursive, optional;
	int tree; /* a detached copy of the source's mount, attached once we are in the container */
};

static char *text[TEXT_OPTIONS];
static bool on[SWITCHES] = {[WRITABLE] = true};
static struct bind binds[MAX_MOUNTS];
static int bind_count;

/* ---------------------------------------------------------------- messages, as Pyxis words them */

__attribute__((format(printf, 1, 2))) static int failed(const char *format, ...)
{
	char message[2048];
	va_list args;

	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	slurm_error("pyxis: %s", message);
	return -1;
}

/* A failure that real Pyxis only knows from enroot's output, which it prints line by line. */
__attribute__((format(printf, 2, 3))) static int enroot_failed(const char *stage, const char *format, ...)
{
	char message[2048];
	va_list args;

	va_start(args, format);
	vsnprintf(message, sizeof message, format, args);
	va_end(args);
	slurm_error("pyxis: container %s failed with error code: 1", stage);
	slurm_error("pyxis: printing enroot log file:");
	slurm_error("pyxis:     %s", message);
	return -1;
}

/* ------------------------------------------------------------------------------------- options */

/* SRC[:DST[:FLAGS]]; FLAGS are joined by '+'. Checked by srun, before anything runs on a node. */
static int parse_mount(char *entry)
{
	struct bind *mount = &binds[bind_count];
	char *flags, *flag, *source = strsep(&entry, ":");

	if (bind_count == MAX_MOUNTS)
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
	bind_count++;
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
		bind_count = 0;
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
	return 0;
}

/* ---------------------------------------------------------------------------------- filesystem */

/* Makes a directory, or an empty file when `file`, with the directories above it. */
static int create(const char *path, bool file)
{
	char partial[4096];

	for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		snprintf(partial, sizeof partial, "%.*s", (int)(slash - path), path);
		if (mkdir(partial, 0755) && errno != EEXIST)
			return -1;
	}
	if (!file)
		return mkdir(path, 0755) && errno != EEXIST ? -1 : 0;
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	return fd < 0 ? -1 : close(fd);
}

/* Mounts a squashfs file through a loop device that the kernel frees together with the mount. */
static int mount_squashfs(int image, const char *where)
{
	struct loop_config config = {.fd = image, .info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR};
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	int rc = -1;

	for (int attempt = 0; control >= 0 && attempt < 100; attempt++) {
		char device[64];
		snprintf(device, sizeof device, "/dev/loop%d", ioctl(control, LOOP_CTL_GET_FREE));
		int loop = open(device, O_RDONLY | O_CLOEXEC);
		if (loop >= 0 && ioctl(loop, LOOP_CONFIGURE, &config) == 0) {
			rc = mount(device, where, "squashfs", MS_RDONLY | MS_NODEV, NULL);
			close(loop);
			break;
		}
		if (loop >= 0)
			close(loop);
		usleep(10000); /* another task took this device: ask for the next */
	}
	if (control >= 0)
		close(control);
	return rc;
}

static int copy_tree(const char *path, bool recursive)
{
	return open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (recursive ? AT_RECURSIVE : 0));
}

/* Attaches a copied mount in the container; the target is made if it is missing. */
static int attach(int tree, const char *target, bool read_only)
{
	struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};
	struct stat status;

	if (fstat(tree, &status) || create(target, !S_ISDIR(status.st_mode)))
		return -1;
	if (read_only && mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes))
		return -1;
	return move_mount(tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH);
}

static char *read_file(const char *path)
{
	FILE *file = fopen(path, "re");
	char *content = NULL;
	size_t size = 0;

	if (!file)
		return strdup("");
	if (getdelim(&content, &size, '\0', file) < 0 && content)
		content[0] = '\0';
	fclose(file);
	return content ? content : strdup("");
}

static void write_file(const char *path, const char *mode, const char *content)
{
	FILE *file = fopen(path, mode);

	if (file) {
		fputs(content, file);
		fclose(file);
	}
}

/* ----------------------------------------------------------------------------------- container */

struct account {
	uid_t uid;
	gid_t gid;
	char name[64], home[1024], entry[2048];
};

static void find_account(struct account *user)
{
	struct passwd *entry = getpwuid(user->uid);

	snprintf(user->name, sizeof user->name, "%s", entry ? entry->pw_name : "user");
	snprintf(user->home, sizeof user->home, "%s", entry ? entry->pw_dir : "/");
	snprintf(user->entry, sizeof user->entry, "%s:x:%u:%u::%s:/bin/sh\n", user->name, user->uid, user->gid,
		 user->home);
}

/* What the job's user may see is decided as that user, before any privilege is taken back. */
static int open_sources(const struct account *user)
{
	if (on[MOUNT_HOME] && bind_count < MAX_MOUNTS)
		binds[bind_count++] = (struct bind){strdup(user->home), strdup(user->home), false, true, false, -1};
	for (int i = 0; i < bind_count; i++)
		if (access(binds[i].source, F_OK) && !binds[i].optional)
			return failed("--container-mounts: source path does not exist: %s", binds[i].source);
	return 0;
}

static int open_image(void)
{
	const char *path = text[IMAGE];
	char magic[4] = "";

	if (path[0] != '/' && path[0] != '.') {
		enroot_failed("import", "[ERROR] Could not resolve host: registry-1.docker.io");
		return failed("failed to import docker image");
	}
	int image = open(path, O_RDONLY | O_CLOEXEC);
	if (image < 0) {
		enroot_failed("creation", "[ERROR] %s: %s", strerror(errno), path);
		return failed("failed to create container filesystem for image: %s", path);
	}
	if (read(image, magic, sizeof magic) != sizeof magic || memcmp(magic, "hsqs", sizeof magic)) {
		enroot_failed("creation", "[ERROR] Invalid image format: %s", path);
		return failed("failed to create container filesystem for image: %s", path);
	}
	return image;
}

/* Leaves the process in the container's root, with the mounts in place. Needs root. */
static int enter(int image, const char *staging, const struct account *user)
{
	char *hosts = read_file("/etc/hosts"), *resolver = read_file("/etc/resolv.conf");
	int proc, sys, dev;

	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return failed("couldn't unshare the mount namespace: %m");
	if ((proc = copy_tree("/proc", true)) < 0 || (sys = copy_tree("/sys", true)) < 0 ||
	    (dev = copy_tree("/dev", true)) < 0)
		return failed("couldn't copy a system mount: %m");
	for (int i = 0; i < bind_count; i++) {
		binds[i].tree = copy_tree(binds[i].source, binds[i].recursive);
		if (binds[i].tree < 0 && !binds[i].optional)
			return enroot_failed("start", "enroot-mount: failed to mount: %s: %m", binds[i].source);
	}

	if (mount("tmpfs", staging, "tmpfs", 0, "mode=755") || chdir(staging) || mkdir("lower", 0755) ||
	    mkdir("upper", 0755) || mkdir("work", 0755) || mkdir("root", 0755))
		return failed("couldn't prepare %s: %m", staging);
	if (mount_squashfs(image, "lower")) {
		enroot_failed("creation", "FATAL ERROR: File system corruption detected");
		return failed("failed to create container filesystem for image: %s", text[IMAGE]);
	}
	if (mount("overlay", "root", "overlay", 0, "lowerdir=lower,upperdir=upper,workdir=work"))
		return failed("couldn't mount the overlay: %m");
	if (chdir("root") || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		return failed("couldn't enter the container: %m");

	create("/tmp", false);
	if (attach(proc, "/proc", false) || attach(sys, "/sys", false) || attach(dev, "/dev", false) ||
	    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"))
		return failed("couldn't mount a system directory: %m");
	create("/etc", false);
	write_file("/etc/hosts", "we", hosts);
	write_file("/etc/resolv.conf", "we", resolver);
	char *known = read_file("/etc/passwd"), number[32];
	snprintf(number, sizeof number, ":%u:%u:", user->uid, user->gid);
	if (!strstr(known, number))
		write_file("/etc/passwd", "ae", user->entry);
	free(known);
	free(hosts);
	free(resolver);

	for (int i = 0; i < bind_count; i++)
		if (binds[i].tree >= 0 && attach(binds[i].tree, binds[i].target, binds[i].read_only))
			return enroot_failed("start", "enroot-mount: failed to mount: %s at %s: %m", binds[i].source,
					     binds[i].target);
	if (!on[WRITABLE]) {
		struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};
		if (mount_setattr(AT_FDCWD, "/", 0, &attributes, sizeof attributes))
			return failed("couldn't make the container read-only: %m");
	}
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
	return 0;
}

/*
 * The image's /etc/environment wins over the job's variables; then enroot's login shell lets the
 * distribution's /etc/profile set PATH, unless the job says ENROOT_LOGIN_SHELL=no.
 */
static int set_environment(spank_t spank, const char *home)
{
	char *image = read_file("/etc/environment"), *rest = image, *line, value[4096], login[16] = "";
	char path[4096 + 5] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

	while ((line = strsep(&rest, "\n"))) {
		char *equals = strchr(line, '=');
		if (line[0] == '#' || !equals)
			continue;
		*equals = '\0';
		if (!job_wins(line))
			spank_setenv(spank, line, equals + 1, 1);
	}
	free(image);
	spank_setenv(spank, "HOME", home, 1);

	if (spank_getenv(spank, "NVIDIA_VISIBLE_DEVICES", value, sizeof value) == ESPANK_SUCCESS && value[0] &&
	    strcmp(value, "void")) {
		enroot_failed("start", "[ERROR] Command not found: nvidia-container-cli, see https://github.com/"
				       "NVIDIA/libnvidia-container");
		return failed("    [ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1");
	}

	if (spank_getenv(spank, "PATH", value, sizeof value) == ESPANK_SUCCESS)
		snprintf(path, sizeof path, "PATH=%s", value);
	spank_getenv(spank, "ENROOT_LOGIN_SHELL", login, sizeof login);
	bool profile = !job_wins("PATH") && strcmp(login, "no") && strcmp(login, "n");
	char *const environment[] = {path, NULL};
	if (shell(profile ? "[ ! -r /etc/profile ] || . /etc/profile >/dev/null 2>&1; printf %s \"$PATH\""
			  : "printf %s \"$PATH\"",
		  environment, value, sizeof value))
		return -1;
	spank_setenv(spank, "PATH", value, 1);
	return 0;
}

/* Makes the user root of a user namespace in which nobody else exists. */
static int become_root(const struct account *user)
{
	char map[64];

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

static int start_container(spank_t spank, const char *staging)
{
	struct account user = {.uid = geteuid(), .gid = getegid()};
	struct { unsigned version; int pid; } header = {0x20080522, 0}; /* capabilities, version 3 */
	struct { unsigned effective, permitted, inheritable; } sets[2] = {{0}, {0}};
	int image, entered;

	find_account(&user);
	if ((image = open_image()) < 0 || open_sources(&user))
		return -1;
	/* Root for the mounts only: going back to the user clears every capability for good. */
	if (user.uid != 0) {
		if (syscall(SYS_capget, &header, sets))
			return failed("couldn't read the capabilities: %m");
		sets[0].effective = sets[0].permitted;
		sets[1].effective = sets[1].permitted;
		if (syscall(SYS_capset, &header, sets) || setresuid(0, 0, 0))
			return failed("couldn't take privileges: %m");
	}
	entered = enter(image, staging, &user);
	prctl(PR_SET_KEEPCAPS, 0);
	if (user.uid != 0 && setresuid(user.uid, user.uid, user.uid))
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
		return -1;
	}
	return 0;
}
