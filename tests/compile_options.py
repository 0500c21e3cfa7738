"""What an executable says of the options that it was compiled with."""


def options_in_force(executable) -> dict[str, object]:
    """The overrides that an executable carries: its serialised form ends in its compile options.

    A protobuf map: 0x0a, length, name, 0x12, length, value; field 1 of a value is a text, 2 a bool
    and 3 a whole number (OptionOverrideProto of XLA's compile_options.proto).
    """
    data, found, at = executable.serialize(), {}, 0
    while (at := data.find(b"xla_", at)) > 0:
        size = data[at - 1]
        name, rest = data[at : at + size], data[at + size :]
        if data[at - 2] == 0x0A and rest[:1] == b"\x12" and name.replace(b"_", b"").isalnum():
            found[name.decode()] = _override(rest[2 : 2 + rest[1]])
        at += 4
    return found


def _override(value: bytes) -> object:
    field, body = value[0] >> 3, value[1:]
    if field == 1:
        return body[1:].decode()
    number = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(body))
    return bool(number) if field == 2 else number
