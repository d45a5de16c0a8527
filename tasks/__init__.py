"""How one stage is made: parent side here, machinery in runtime/, heavy bodies in jobs/."""
