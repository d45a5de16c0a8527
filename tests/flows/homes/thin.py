"""placeholder"""


def thin(home, dest):
    return None
