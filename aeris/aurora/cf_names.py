"""Names of Aurora's variables in files of others: WeatherBench 2's name, unit and CF standard name.

Where WeatherBench 2 has no name, that of the Copernicus stores (CDS, ADS) is taken. Units are those of
Aurora's checkpoints. An empty standard name: the CF table (version 86) has none that fits.
"""

from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """What a file says about a variable."""

    long: str
    units: str
    standard: str = ""


SURFACE: dict[str, Name] = {
    "2t": Name("2m_temperature", "K", "air_temperature"),
    "10u": Name("10m_u_component_of_wind", "m s-1", "eastward_wind"),
    "10v": Name("10m_v_component_of_wind", "m s-1", "northward_wind"),
    "msl": Name("mean_sea_level_pressure", "Pa", "air_pressure_at_mean_sea_level"),
    "2d": Name("2m_dewpoint_temperature", "K", "dew_point_temperature"),
    "tcwv": Name("total_column_water_vapour", "kg m-2", "atmosphere_mass_content_of_water_vapor"),
    "tcc": Name("total_cloud_cover", "1", "cloud_area_fraction"),
    "lcc": Name("low_cloud_cover", "1", "low_type_cloud_area_fraction"),
    "mcc": Name("medium_cloud_cover", "1", "medium_type_cloud_area_fraction"),
    "hcc": Name("high_cloud_cover", "1", "high_type_cloud_area_fraction"),
    "100u": Name("100m_u_component_of_wind", "m s-1", "eastward_wind"),
    "100v": Name("100m_v_component_of_wind", "m s-1", "northward_wind"),
    "sp": Name("surface_pressure", "Pa", "surface_air_pressure"),
    "skt": Name("skin_temperature", "K", "surface_temperature"),
    "stl1": Name("soil_temperature_level_1", "K", "soil_temperature"),
    "swvl1": Name("volumetric_soil_water_layer_1", "m3 m-3", "volume_fraction_of_condensed_water_in_soil"),
    "ci": Name("sea_ice_cover", "1", "sea_ice_area_fraction"),
    "scaled_sd": Name("snow_depth", "m", "lwe_thickness_of_surface_snow_amount"),
    "i10fg": Name("instantaneous_10m_wind_gust", "m s-1", "wind_speed_of_gust"),
    "blh": Name("boundary_layer_height", "m", "atmosphere_boundary_layer_thickness"),
    "uvb_1h": Name("downward_uv_radiation_at_the_surface_1hr", "J m-2"),
    "ssrd_1h": Name("surface_solar_radiation_downwards_1hr", "J m-2"),
    "ttr_1h": Name("top_net_thermal_radiation_1hr", "J m-2"),
    "scaled_tp_1h": Name("total_precipitation_1hr", "m", "lwe_thickness_of_precipitation_amount"),
    "scaled_sf_1h": Name("snowfall_1hr", "m", "lwe_thickness_of_snowfall_amount"),
    "swh": Name(
        "significant_height_of_combined_wind_waves_and_swell", "m", "sea_surface_wave_significant_height"
    ),
    "mwd": Name("mean_wave_direction", "degree", "sea_surface_wave_from_direction"),
    "mwp": Name("mean_wave_period", "s"),
    "pp1d": Name("peak_wave_period", "s"),
    "shww": Name("significant_height_of_wind_waves", "m", "sea_surface_wind_wave_significant_height"),
    "mdww": Name("mean_direction_of_wind_waves", "degree", "sea_surface_wind_wave_from_direction"),
    "mpww": Name("mean_period_of_wind_waves", "s"),
    "shts": Name("significant_height_of_total_swell", "m", "sea_surface_swell_wave_significant_height"),
    "mdts": Name("mean_direction_of_total_swell", "degree", "sea_surface_swell_wave_from_direction"),
    "mpts": Name("mean_period_of_total_swell", "s"),
    "swh1": Name("significant_wave_height_of_first_swell_partition", "m"),
    "mwd1": Name("mean_wave_direction_of_first_swell_partition", "degree"),
    "mwp1": Name("mean_wave_period_of_first_swell_partition", "s"),
    "swh2": Name("significant_wave_height_of_second_swell_partition", "m"),
    "mwd2": Name("mean_wave_direction_of_second_swell_partition", "degree"),
    "mwp2": Name("mean_wave_period_of_second_swell_partition", "s"),
    "pm1": Name(
        "particulate_matter_1um", "kg m-3", "mass_concentration_of_pm1_ambient_aerosol_particles_in_air"
    ),
    "pm2p5": Name(
        "particulate_matter_2.5um", "kg m-3", "mass_concentration_of_pm2p5_ambient_aerosol_particles_in_air"
    ),
    "pm10": Name(
        "particulate_matter_10um", "kg m-3", "mass_concentration_of_pm10_ambient_aerosol_particles_in_air"
    ),
    "tcco": Name("total_column_carbon_monoxide", "kg m-2", "atmosphere_mass_content_of_carbon_monoxide"),
    "tc_no": Name("total_column_nitrogen_monoxide", "kg m-2", "atmosphere_mass_content_of_nitrogen_monoxide"),
    "tcno2": Name("total_column_nitrogen_dioxide", "kg m-2", "atmosphere_mass_content_of_nitrogen_dioxide"),
    "gtco3": Name("total_column_ozone", "kg m-2", "atmosphere_mass_content_of_ozone"),
    "tcso2": Name("total_column_sulphur_dioxide", "kg m-2", "atmosphere_mass_content_of_sulfur_dioxide"),
}
LEVELLED: dict[str, Name] = {
    "z": Name("geopotential", "m2 s-2", "geopotential"),
    "u": Name("u_component_of_wind", "m s-1", "eastward_wind"),
    "v": Name("v_component_of_wind", "m s-1", "northward_wind"),
    "t": Name("temperature", "K", "air_temperature"),
    "q": Name("specific_humidity", "kg kg-1", "specific_humidity"),
    "w": Name("vertical_velocity", "Pa s-1", "lagrangian_tendency_of_air_pressure"),
    "co": Name("carbon_monoxide", "kg kg-1", "mass_fraction_of_carbon_monoxide_in_air"),
    "no": Name("nitrogen_monoxide", "kg kg-1", "mass_fraction_of_nitrogen_monoxide_in_air"),
    "no2": Name("nitrogen_dioxide", "kg kg-1", "mass_fraction_of_nitrogen_dioxide_in_air"),
    "go3": Name("ozone", "kg kg-1", "mass_fraction_of_ozone_in_air"),
    "so2": Name("sulphur_dioxide", "kg kg-1", "mass_fraction_of_sulfur_dioxide_in_air"),
}
STATIC: dict[str, Name] = {
    "z": Name("geopotential_at_surface", "m2 s-2", "surface_geopotential"),
    "lsm": Name("land_sea_mask", "1", "land_area_fraction"),
    "slt": Name("soil_type", "1", "soil_type"),
}


def describe(table: dict[str, Name], short: str) -> tuple[str, dict[str, str]]:
    """Return the name of a variable in a file and its attributes; an unknown one keeps its own name."""
    if short not in table:
        return short, {"short_name": short}
    long, units, standard = table[short]
    attrs = {"short_name": short, "units": units, "long_name": long.replace("_", " ")}
    return long, {**attrs, "standard_name": standard} if standard else attrs
