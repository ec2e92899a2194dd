"""The process that eval/sandbox.py starts for each program.

    python -s -S -B sandbox_child.py SECONDS CPU_SECONDS MEMORY_MB OUTPUT_BYTES FILE_BYTES < job

It is a judge, which isolates itself, forks a player, and only then reads the job: the player's
memory never holds the tests while the program runs. The player confines itself, runs the program,
restores what the program may have replaced, and asks for the tests with a password. A second
password comes with the tests and reports success. Slow imports are avoided.
"""

import marshal
import os
import sys
import time

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
    seconds = float(argv[0])
    cpu, memory, output, size = map(int, argv[1:])
    facts = isolate(size)
    down_read, down = os.pipe()
    up, up_write = os.pipe()
    out, out_write = os.pipe()
    judge_id = os.getpid()
    player = os.fork()
    if player == 0:
        try:
            facts += confine(down_read, up_write, out_write, judge_id, "namespaces" in facts)
            facts += set_limits(CPU=cpu, AS=memory << 20, FSIZE=size, NPROC=1, NOFILE=64, CORE=0)
            facts += refuse_calls(CALLS.get(os.uname().machine))
            os.write(up_write, " ".join(["ready", *facts]).encode() + b"\n")
        except BaseException as error:
            os.write(up_write, f"{type(error).__name__}: {error}".encode()[:CLIP])
            os._exit(1)
        play(down_read, up_write)
    for fd in (down_read, up_write, out_write):
        os.close(fd)
    ready = os.read(up, CLIP)
    if not ready.startswith(b"ready"):
        raise OSError(ready.decode() or "the player ended before it was confined")
    os.write(1, ready)
    status, detail = judge(player, down, up, out, seconds, cpu, output)
    os.write(1, f"{status}\n{detail}".encode(errors="replace"))
    os.killpg(0, 9)


def isolate(size: int) -> list[str]:
    """Leave the network, hide other processes, and allow writing to one folder in memory only.

    Returns "namespaces", "sealed" or both, as far as the system allows it.
    """
    if sys.platform != "linux":
        return []
    libc = load_libc()
    write_file("/proc/self/oom_score_adj", "1000")  # the first to go if the machine lacks memory
    facts = []
    user, group = os.geteuid(), os.getegid()
    mounts, ipc, new_user, pids, network = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    if libc.unshare(mounts | ipc | pids | network | (new_user if user else 0)) == 0:
        facts.append("namespaces")
        if user:  # an ordinary user is allowed the rest in a user namespace
            write_file("/proc/self/setgroups", "deny")
            write_file("/proc/self/uid_map", f"{user} {user} 1")
            write_file("/proc/self/gid_map", f"{group} {group} 1")
        libc.mount(None, b"/", None, 0x44000, None)  # private, recursive
        read_only = (1).to_bytes(8, sys.byteorder) + bytes(24)  # struct mount_attr
        # mount_setattr(2) has the number 442 on all machines.
        sealed = libc.syscall(442, -100, b"/", 0x8000, read_only, len(read_only)) == 0
        folder = os.getcwd()
        options = f"size={size},nr_inodes=1024,mode=0777".encode()
        sealed &= libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 2 | 4, options) == 0
        os.chdir(folder)  # into the new file system
        facts += ["sealed"] * sealed
    libc.prctl(PARENT_DEATH_SIGNAL, 9)
    libc.prctl(DUMPABLE, 0)  # processes of the same user cannot read our memory
    return facts


def confine(down: int, up: int, out: int, judge_id: int, namespaces: bool) -> list[str]:
    """Drop files, environment and privileges. Returns "user=ID" if the user changed."""
    if namespaces:  # show the processes of this namespace only; no suid, devices, exec
        load_libc().mount(b"proc", b"/proc", b"proc", 2 | 4 | 8, None)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd, source in enumerate((nothing, out, out)):
        os.dup2(source, fd)
    for fd in range(3, 256):
        if fd not in (down, up):
            os.closerange(fd, fd + 1)
    sys.argv[:] = [""]
    os.environ.clear()
    library = {path: os.open(path, os.O_RDONLY) for path in sys.path if os.path.isdir(path)}
    facts = drop_user(judge_id) if os.geteuid() == 0 else []
    keep_library(library)
    if sys.platform == "linux":
        libc = load_libc()
        libc.prctl(PARENT_DEATH_SIGNAL, 9)  # again: a change of user resets it
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.capset((0x20080522).to_bytes(4, sys.byteorder) + bytes(4), bytes(24))
    return facts


def drop_user(judge_id: int) -> list[str]:
    """Become an unused user. Changes nothing if root is the only user."""
    for first in (1_900_000_000, 40_000):  # the second if user ids have 16 bits
        user = first + judge_id % 20_000
        try:
            os.chown(".", user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return [f"user={user}"]
        except OSError:
            continue
    return []


def keep_library(folders: dict[str, int]) -> None:
    """Import the standard library through open folders if only root may enter them by name."""
    if os.access(os.__file__, os.R_OK):
        for fd in folders.values():
            os.close(fd)
        return
    opened = {path: f"/proc/self/fd/{fd}" for path, fd in folders.items()}
    sys.path[:] = opened.values()
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        for home in getattr(module, "__path__", [])[:]:
            parent, name = os.path.split(home)
            module.__path__ = [os.path.join(opened.get(parent, parent), name)]


def refuse_calls(calls: tuple[int, list[int]] | None) -> list[str]:
    """Let the kernel refuse system calls, see seccomp(2). Returns ["filter"] if it does."""
    if calls is None or sys.platform != "linux" or sys.maxsize < 1 << 32:
        return []
    import ctypes
    import struct

    machine, numbers = calls
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
    return ["filter"] if load_libc().prctl(SET_FILTER, 2, program, 0, 0) == 0 else []


def set_limits(**limits: int) -> list[str]:
    """Set resource limits, never above the present ones. Returns no_NAME for each refused one."""
    import resource

    refused = []
    for name, value in limits.items():
        try:
            kind = getattr(resource, f"RLIMIT_{name}")
            top = resource.getrlimit(kind)[1]
            hard = value + (name == "CPU")  # the first process of a namespace only ends at this one
            hard = hard if top == resource.RLIM_INFINITY else min(hard, top)
            resource.setrlimit(kind, (min(value, hard), hard))
        except (AttributeError, OSError, ValueError):
            refused.append(f"no_{name}")
    return refused


def judge(player, down, up, out, seconds, cpu, output) -> tuple[str, str]:
    """Send the program, then the tests, to the player. Return (status, detail)."""
    import select

    program, tests, modules = marshal.load(sys.stdin.buffer)
    passwords = [os.urandom(16).hex() for _ in range(2)]
    send(down, (program, modules, passwords[0]))
    deadline = time.monotonic() + seconds
    answer = printed = b""
    n_printed = 0
    tests_sent = late = False
    ended = (0, 0, None)
    poll = select.poll()
    poll.register(up, select.POLLIN)
    poll.register(out, select.POLLIN)
    while not (ended[0] or late or n_printed > output or answer.endswith(b"\n")):
        ended = os.wait4(player, os.WNOHANG)  # before reading, so that the last output is read
        for fd, _ in poll.poll(50):  # milliseconds
            chunk = os.read(fd, 65536)
            if not chunk:
                poll.unregister(fd)
            elif fd == up:
                answer = (answer + chunk)[: 2 * CLIP]
            else:
                printed = (printed + chunk)[-CLIP:]
                n_printed += len(chunk)
        if not tests_sent and answer == passwords[0].encode() + b"\n":  # the program has run
            answer = b""
            tests_sent = True
            send(down, (tests, passwords[1]))
        late = time.monotonic() > deadline or len(answer) == 2 * CLIP
    if not ended[0]:
        os.kill(player, 9)
        ended = os.wait4(player, 0)
    last_line = printed.decode(errors="replace").strip().rpartition("\n")[2]
    if n_printed > output:
        return "output", f"wrote more than {output} bytes"
    if late and len(answer) < 2 * CLIP:
        return "timeout", last_line or f"ran for {seconds:g} s"
    if tests_sent and answer == passwords[1].encode() + b"\n":
        return "passed", ""
    return why(answer.decode(errors="replace"), ended, last_line, cpu)


def why(answer: str, ended: tuple, last_line: str, cpu: int) -> tuple[str, str]:
    """Return (status, detail) of a program that failed. ended: the result of wait4."""
    _, code, usage = ended
    used = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(code) and (os.WTERMSIG(code) == 24 or used >= cpu):  # SIGXCPU
        return "timeout", last_line or f"used {cpu} s of CPU"
    status, _, detail = answer.partition(" ")
    if status in ("failed", "memory", "exit", "not_python"):
        return status, detail
    if answer:
        return "failed", "wrote to the descriptor of its verdict"
    if os.WIFSIGNALED(code):
        return "killed", last_line or f"by signal {os.WTERMSIG(code)}"
    return "exit", last_line or f"left with status {os.WEXITSTATUS(code)} before its tests ended"


def play(down: int, up: int) -> None:
    """Run the program, then the tests in its names.

    All names needed after the program are local, because the program may replace the others.
    """
    write, leave, untrace, unprofile = os.write, os._exit, sys.settrace, sys.setprofile
    no_memory, anything = MemoryError, BaseException
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

    stage = "not_python"
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
        stage = "failed"
        exec(code, names)
        restore()
        write(up, password.encode() + b"\n")
        tests, password = load(source)
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
        write(up, password.encode() + b"\n")
    except no_memory:  # no formatting, because that takes memory
        write(up, b"memory MemoryError\n" if stage == "failed" else b"not_python MemoryError\n")
    except anything as error:
        restore()
        write(up, describe(error, stage))
    finally:
        leave(0)


def describe(error: BaseException, stage: str) -> bytes:
    """Return the answer for an exception: the status, the error, the line of the tests."""
    try:
        text = f"{type(error).__name__}: {error}".strip(": ")
        if isinstance(error, SystemExit) and stage == "failed":
            stage = "exit"
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != "<tests>":
            trace = trace.tb_next
        if trace:
            text += f" (line {trace.tb_lineno} of the tests)"
        return f"{stage} {text}".replace("\n", " ").encode(errors="replace")[:CLIP] + b"\n"
    except BaseException:  # the program may define __str__
        return stage.encode() + b" an exception that cannot be shown\n"


def send(fd: int, message: tuple) -> None:
    """Write a message for marshal.load."""
    data = marshal.dumps(message)
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:  # the program closed its end; the verdict will show it
        pass


def write_file(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:  # not allowed here
        pass


def load_libc():
    """Return the C library. ctypes is imported late because it takes a millisecond."""
    import ctypes

    return ctypes.CDLL(None)


if __name__ == "__main__":
    del sys.path[0]  # this folder: a program imports the standard library only
    main(sys.argv[1:])
