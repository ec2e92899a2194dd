"""The process that eval/sandbox.py starts for each program.

    python -s -S -B sandbox_child.py CPU_SECONDS MEMORY_MB FILE_BYTES < job

It is a judge, which isolates itself, forks a player, and only then reads the job: the player's
memory never holds the tests while the program runs. The player confines itself, runs the program,
restores what the program may have replaced, and asks for the tests with a password. A second
password comes with the tests and reports success. What the program prints is lost. Slow imports
are avoided.
"""

import ctypes
import marshal
import os
import resource
import struct
import sys

LIBC = ctypes.CDLL(None)
LINUX = sys.platform == "linux"
MACHINE = os.uname().machine

# Refused system calls, by machine. First its number in linux/audit.h, then the numbers of socket,
# kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, ptrace, process_vm_readv,
# process_vm_writev, prctl, pidfd_send_signal, io_uring_setup.
CALLS = {
    "x86_64": (0xC000003E, [41, 62, 200, 234, 129, 297, 101, 310, 311, 157, 424, 425]),
    "aarch64": (0xC00000B7, [198, 129, 130, 131, 138, 240, 117, 270, 271, 167, 424, 425]),
}
PARENT_DEATH_SIGNAL, DUMPABLE, SET_FILTER, NO_NEW_PRIVILEGES = 1, 4, 22, 38  # of prctl(2)
CLIP = 4000  # bytes of an answer; a pipe never splits a write below 4,096 bytes


def main(argv: list[str]) -> None:
    """Judge one program. Ends by killing its process group."""
    cpu, memory, size = map(int, argv)
    facts = isolate(size) if LINUX else []
    down_read, down = os.pipe()
    up, up_write = os.pipe()
    judge_id = os.getpid()
    player = os.fork()
    if player == 0:
        facts += confine(down_read, up_write, judge_id, "own-namespaces" in facts)
        set_limits(CPU=cpu, AS=memory << 20, FSIZE=size, NPROC=1, NOFILE=64, CORE=0)
        facts += refuse_calls(*CALLS[MACHINE]) if LINUX and MACHINE in CALLS else []
        os.write(up_write, " ".join(["ready", *facts]).encode() + b"\n")
        play(down_read, up_write)
    os.close(down_read)
    os.close(up_write)
    answers = os.fdopen(up, "rb")
    if ready := answers.readline(CLIP):
        os.write(1, ready)
        os.write(1, judge(player, down, answers, cpu).encode())
    os.killpg(0, 9)


def isolate(size: int) -> list[str]:
    """Leave the network, hide other processes, and allow writing to one folder in memory only.

    Returns "own-namespaces", "read-only-files" or both, as far as Linux allows it.
    """
    facts = []
    user, group = os.geteuid(), os.getegid()
    mounts, ipc, new_user, pids, network = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    if LIBC.unshare(mounts | ipc | pids | network | (new_user if user else 0)) == 0:
        facts.append("own-namespaces")
        if user:  # an ordinary user is allowed the rest in a user namespace
            ids = {"uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
            for name, text in ({"setgroups": "deny"} | ids).items():
                try:
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
                except OSError:  # not allowed here
                    pass
        LIBC.mount(None, b"/", None, 0x44000, None)  # private, recursive
        read_only = (1).to_bytes(8, sys.byteorder) + bytes(24)  # struct mount_attr
        # mount_setattr(2) has the number 442 on all machines.
        sealed = LIBC.syscall(442, -100, b"/", 0x8000, read_only, len(read_only)) == 0
        folder = os.getcwd()
        options = f"size={size},nr_inodes=1024,mode=0777".encode()
        sealed &= LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 2 | 4, options) == 0
        os.chdir(folder)  # into the new file system
        facts += ["read-only-files"] * sealed
    LIBC.prctl(PARENT_DEATH_SIGNAL, 9)
    LIBC.prctl(DUMPABLE, 0)  # processes of the same user cannot read our memory
    return facts


def confine(down: int, up: int, judge_id: int, namespaces: bool) -> list[str]:
    """Drop files, environment and privileges. Returns what drop_user does."""
    if namespaces:  # show the processes of this namespace only; no suid, devices, exec
        LIBC.mount(b"proc", b"/proc", b"proc", 2 | 4 | 8, None)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    for fd in range(3, 256):
        if fd not in (down, up):
            os.closerange(fd, fd + 1)
    sys.argv[:] = [""]
    os.environ.clear()
    library = {path: os.open(path, os.O_RDONLY) for path in sys.path if os.path.isdir(path)}
    facts = drop_user(judge_id) if os.geteuid() == 0 else []
    if not os.access(os.__file__, os.R_OK):
        keep_library(library)
    if LINUX:
        LIBC.prctl(PARENT_DEATH_SIGNAL, 9)  # again: a change of user resets it
        LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        LIBC.capset((0x20080522).to_bytes(4, sys.byteorder) + bytes(4), bytes(24))
    return facts


def drop_user(judge_id: int) -> list[str]:
    """Become an unused user. Returns ["unused-user"], or nothing if root is the only user."""
    user = 61_184 + judge_id % 4_336  # systemd keeps these ids for users without files
    try:
        os.chown(".", user, user)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    except OSError:
        return []
    return ["unused-user"]


def keep_library(folders: dict[str, int]) -> None:
    """Import the standard library through open folders: only root may enter them by name."""
    opened = {path: f"/proc/self/fd/{fd}" for path, fd in folders.items()}
    sys.path[:] = opened.values()
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        for home in getattr(module, "__path__", [])[:]:
            parent, name = os.path.split(home)
            module.__path__ = [os.path.join(opened.get(parent, parent), name)]


def refuse_calls(machine: int, numbers: list[int]) -> list[str]:
    """Let the kernel refuse system calls, see seccomp(2). Returns ["call-filter"] if it does."""
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x50001  # refuse: EPERM
    # An instruction: what, steps to skip if true, steps to skip if false, value.
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, refuse)]
    steps += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x32 calls
    for number in numbers:
        steps += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    steps.append((end, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    return ["call-filter"] if LIBC.prctl(SET_FILTER, 2, program, 0, 0) == 0 else []


def set_limits(**limits: int) -> None:
    """Set resource limits, see setrlimit(2)."""
    for name, value in limits.items():
        hard = value + (name == "CPU")  # the first process of a namespace only ends at this one
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
        except (OSError, ValueError):  # the present limit is lower; or AS, which macOS lacks
            pass


def judge(player, down, answers, cpu) -> str:
    """Send the program, then the tests, to the player. Return the status."""
    program, tests, modules = marshal.load(sys.stdin.buffer)
    passwords = [os.urandom(16).hex().encode() + b"\n" for _ in range(2)]
    send(down, (program, modules, passwords[0]))
    answer = answers.readline(CLIP)
    tests_sent = answer == passwords[0]
    if tests_sent:  # the program has run
        send(down, (tests, passwords[1]))
        answer = answers.readline(CLIP)
    if answer:
        os.kill(player, 9)
    _, code, usage = os.wait4(player, 0)
    killed_by = os.WTERMSIG(code)  # 0 if it left by itself
    if tests_sent and answer == passwords[1]:
        return "passed"
    if killed_by == 24 or killed_by and usage.ru_utime + usage.ru_stime >= cpu:  # SIGXCPU
        return "timeout"
    if answer:  # other words: the program wrote to the descriptor of its verdict
        status = answer.decode(errors="replace").strip()
        return status if status in ("memory", "exit", "not_python") else "failed"
    return "killed" if killed_by else "exit"


def play(down: int, up: int) -> None:
    """Run the program, then the tests in its names.

    All names needed after the program are local, because the program may replace the others.
    """
    write, leave, untrace, unprofile = os.write, os._exit, sys.settrace, sys.setprofile
    no_memory, system_exit, anything = MemoryError, SystemExit, BaseException
    source, load = os.fdopen(down, "rb"), marshal.load
    program, modules, password = load(source)
    for name in modules:
        try:
            __import__(name)
        except ImportError:  # the tests will fail with it
            pass
    loaded, before = sys.modules, dict(sys.modules)
    undo = [(vars(module).update, dict(vars(module))) for module in before.values()]
    answer = type(sys)("answer")  # a module, because dataclasses look up their module
    loaded["answer"], names, builtins = answer, vars(answer), before["builtins"]

    def restore():
        untrace(None)
        unprofile(None)
        loaded.update(before)
        for update, old in undo:
            update(old)
        names["__builtins__"] = builtins

    status = b"not_python\n"
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
        status = b"failed\n"
        exec(code, names)
        restore()
        write(up, password)
        tests, password = load(source)
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
        write(up, password)
    except no_memory:
        write(up, status.replace(b"failed", b"memory"))
    except system_exit:
        write(up, b"exit\n")
    except anything:
        write(up, status)
    finally:
        leave(0)


def send(fd: int, message: tuple) -> None:
    """Write a message for marshal.load."""
    try:
        os.write(fd, marshal.dumps(message))  # a pipe that blocks takes all
    except OSError:  # the program closed its end; the verdict will show it
        pass


if __name__ == "__main__":
    del sys.path[0]  # this folder: a program imports the standard library only
    main(sys.argv[1:])
